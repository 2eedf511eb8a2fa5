// Memory that is kept and read from end to end, in large pages where the system has them: each step of a
// program touches other pages.
#pragma once

#include <cstddef>

namespace dsp {

// At least `bytes` bytes of undefined content, to be given back by std::free. Throws std::bad_alloc.
void* take_pages(size_t bytes);

}  // namespace dsp

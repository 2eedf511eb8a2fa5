#include "core/pages.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dsp {

void* take_pages(size_t bytes) {
  constexpr size_t kSmall = 4096;
  constexpr size_t kLarge = size_t{1} << 21;
  const size_t page = bytes >= kLarge ? kLarge : kSmall;
  const size_t rounded = (bytes + page - 1) / page * page;
  void* memory = rounded < bytes ? nullptr : std::aligned_alloc(page, rounded);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Where it is refused the pages are small.
  if (page == kLarge) static_cast<void>(madvise(memory, rounded, MADV_HUGEPAGE));
#endif
  return memory;
}

}  // namespace dsp

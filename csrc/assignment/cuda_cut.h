// Making the table of assignment/cuda_table.h, on the host.
#pragma once

#include <cstdint>
#include <vector>

namespace dsp {
namespace cuda {
namespace lasso {

// The words for layers of these shapes (see dsp_cuda_lasso_table). tile: elements of a tile, about, or 0
// where the network's size decides. Throws Error.
std::vector<int64_t> make_table(int64_t element, int64_t groups, const int64_t* shapes, int64_t shapes_numel,
                                int64_t tile);

}  // namespace lasso
}  // namespace cuda
}  // namespace dsp

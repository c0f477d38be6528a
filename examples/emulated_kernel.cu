// Sums the rows of a matrix: one block per row, shuffles within a warp, shared memory between warps.
#include "device/barrier.cuh"
#include "device/shared.cuh"
#include "device/warp.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels {
namespace {

struct WarpSums {
  float values[32];
};

// in[0]: (gridDim.x, n[0]) float32. out: (gridDim.x,) float32.
__global__ void row_sum(Arguments a) {
  WarpSums& sums = device::shared_variable<WarpSums>();
  const int thread = threadIdx.x, columns = a.n[0];
  const float* row = static_cast<const float*>(a.in[0]) + blockIdx.x * columns;

  float sum = 0.0f;
  for (int column = thread; column < columns; column += blockDim.x) sum += row[column];
  for (int offset = device::kWarpSize / 2; offset > 0; offset /= 2) sum += device::shuffle_xor(sum, offset);
  if (thread % device::kWarpSize == 0) sums.values[thread / device::kWarpSize] = sum;
  device::sync_block();  // without it thread 0 may read a sum before its warp has written it
  if (thread == 0) {
    float total = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / device::kWarpSize; ++warp) total += sums.values[warp];
    static_cast<float*>(a.out)[blockIdx.x] = total;
  }
}
const Register kRowSum("row_sum", row_sum);

}  // namespace
}  // namespace fastgen::kernels

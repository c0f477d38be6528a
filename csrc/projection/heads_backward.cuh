// Backward of QK-norm and RoPE. Formulas: fastgen/reference.py, rms_norm_backward.
//
//   for each head of a token, one warp each (grid-stride loop)
//     load dy to shared memory
//     dy = inverse rotation of dy                                  RoPE
//     dx = scale * (dy * norm - unit * mean(dy * norm * unit))     RMS norm: unit = x * scale
//     d norm += dy * unit                                          in shared memory, per warp
//   epilogue: add d norm over the warps; projection_sum_rows adds the blocks. Both in a fixed order.
//
//   block: 8 warps, shared memory: dim floats of dy and dim floats of d norm for each warp
//
// Memory bound: in bfloat16 4 bytes are read per element (dy and x) and 2 written.
#pragma once

#include "device/barrier.cuh"
#include "device/shared.cuh"
#include "projection/heads.cuh"
#include "projection/tiles.h"

namespace fastgen::projection {

template <typename T>
__global__ void __launch_bounds__(kHeadThreads, 3)
    projection_heads_backward(const __grid_constant__ HeadBackwardParams p) {
  constexpr int kWarps = kHeadThreads / 32;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int dim = p.grad.parts[0].dim, heads = p.grad.channels / dim;
  float* rows = reinterpret_cast<float*>(device::dynamic_shared());
  float* gradient = rows + warp * dim;     // dy
  float* norm_sums = rows + kWarps * dim;  // of each warp
  float* own_sums = norm_sums + warp * dim;
  for (int channel = lane; channel < dim; channel += 32) own_sums[channel] = 0.0f;

  const int64_t all = static_cast<int64_t>(p.tokens.batch) * p.tokens.count * heads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp; index < all;
       index += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t of_all = index / heads;
    const int head = static_cast<int>(index % heads) * dim;
    const int batch = static_cast<int>(of_all / p.tokens.count), token = static_cast<int>(of_all % p.tokens.count);
    const Place place(p.tokens, batch, token);
    const T* source = address<const T>(p.grad, batch, token, head);
    for (int channel = lane; channel < dim; channel += 32) gradient[channel] = device::to_float(source[channel]);
    device::sync_warp();
    // The inverse rotation.
    const auto unrotated = [&](int channel) {
      if (p.epilogue.cos == nullptr || channel >= 2 * p.epilogue.half) return gradient[channel];
      const Rotation rotation = rotation_of(p.epilogue, place, channel);
      return gradient[channel] * rotation.cos - gradient[rotation.partner] * rotation.sin;
    };
    T* out = address<T>(p.out, batch, token, head);
    if (p.norm == nullptr) {
      for (int channel = lane; channel < dim; channel += 32) out[channel] = device::from_float<T>(unrotated(channel));
    } else {
      const T* kept = address<const T>(p.kept, batch, token, head);
      const T* norm = static_cast<const T*>(p.norm);
      float squares = 0.0f, inner = 0.0f;
      for (int channel = lane; channel < dim; channel += 32) {
        const float y = device::to_float(kept[channel]);
        squares += y * y;
        inner += unrotated(channel) * device::to_float(norm[channel]) * y;
      }
      const float count = static_cast<float>(dim);
      const float scale = 1.0f / sqrtf(team_sum(squares, device::kWarpSize) / count + p.epilogue.eps);
      const float mean = team_sum(inner, device::kWarpSize) * scale / count;
      for (int channel = lane; channel < dim; channel += 32) {
        const float unit = device::to_float(kept[channel]) * scale, after = unrotated(channel);
        own_sums[channel] += after * unit;
        out[channel] = device::from_float<T>(scale * (after * device::to_float(norm[channel]) - unit * mean));
      }
    }
    device::sync_warp();  // the next head overwrites the gradient
  }
  if (p.norm == nullptr) return;
  device::sync_block();
  for (int channel = static_cast<int>(threadIdx.x); channel < dim; channel += kHeadThreads) {
    float sum = 0.0f;
    for (int i = 0; i < kWarps; ++i) sum += norm_sums[i * dim + channel];
    p.norm_parts[static_cast<int64_t>(blockIdx.x) * dim + channel] = sum;
  }
}

}  // namespace fastgen::projection

// A sample of the size of an attention kernel's block: softmax(Q K^T / 8) V for 64 queries, head dim 64, bfloat16.
#pragma once

#include "device/barrier.cuh"
#include "device/convert.cuh"
#include "device/copy.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"
#include "device/warp.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels::attention {

constexpr int kThreads = 128, kQueries = 64, kKeys = 64, kHeadDim = 64, kStages = 2, kChunk = 16;
constexpr int kStride = kHeadDim * 2 + kChunk, kTileBytes = kKeys * kStride;
constexpr int kSharedBytes = kTileBytes + kStages * 2 * kTileBytes;

// in: Q (64, 64), K (n, 64), V (n, 64); out: (64, 64) float32; n[0]: keys, a multiple of 64. Four warps of 16 queries.
static __global__ void kernel(Arguments a) {
  unsigned char* shared = device::dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const auto load = [&](unsigned char* tile, const void* matrix, int first_row) {
    const auto* source = static_cast<const unsigned char*>(matrix) + first_row * kHeadDim * 2;
    for (int i = thread; i < kKeys * 8; i += kThreads) {
      device::async_copy<kChunk>(tile + i / 8 * kStride + i % 8 * kChunk, source + i * kChunk);
    }
  };
  const auto stage = [&](int tile) { return shared + kTileBytes + tile % kStages * 2 * kTileBytes; };

  load(shared, a.in[0], 0);
  load(stage(0), a.in[1], 0);
  load(stage(0) + kTileBytes, a.in[2], 0);
  device::async_copy_commit();

  uint32_t query[4][4];
  float out[8][4] = {}, largest[2] = {-1e30f, -1e30f}, total[2] = {};
  constexpr float kScale = 0.125f * 1.44269504f;
  const int tiles = a.n[0] / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      load(stage(tile + 1), a.in[1], (tile + 1) * kKeys);
      load(stage(tile + 1) + kTileBytes, a.in[2], (tile + 1) * kKeys);
    }
    device::async_copy_commit();
    device::async_copy_wait<1>();
    device::sync_block();
    if (tile == 0) {
      for (int k = 0; k < 4; ++k) {
        device::ldmatrix(query[k], shared + (warp * 16 + lane % 16) * kStride + (k * 2 + lane / 16) * kChunk);
      }
    }
    // S = Q K^T
    const unsigned char *keys = stage(tile), *values = stage(tile) + kTileBytes;
    float scores[8][4] = {};
    for (int pair = 0; pair < 4; ++pair) {
      for (int k = 0; k < 4; ++k) {
        uint32_t rows[4];
        device::ldmatrix(rows,
                         keys + (pair * 16 + lane % 8 + lane / 16 * 8) * kStride + (k * 2 + lane / 8 % 2) * kChunk);
        const uint32_t first[2] = {rows[0], rows[1]}, second[2] = {rows[2], rows[3]};
        device::mma_m16n8k16<BFloat16>(scores[2 * pair], query[k], first);
        device::mma_m16n8k16<BFloat16>(scores[2 * pair + 1], query[k], second);
      }
    }
    // A lane has parts of rows g and g + 8; four lanes have the whole.
    for (int half = 0; half < 2; ++half) {
      float top = largest[half];
      for (auto& score : scores) {
        top = score[2 * half] > top ? score[2 * half] : top;
        top = score[2 * half + 1] > top ? score[2 * half + 1] : top;
      }
      for (int offset = 1; offset < 4; offset *= 2) {
        const float other = device::shuffle_xor(top, offset);
        top = other > top ? other : top;
      }
      const float shrink = device::exp2_approx((largest[half] - top) * kScale);
      largest[half] = top;
      total[half] *= shrink;
      for (auto& sum : out) sum[2 * half] *= shrink, sum[2 * half + 1] *= shrink;
      for (auto& score : scores) {
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          score[i] = device::exp2_approx((score[i] - top) * kScale);
          total[half] += score[i];
        }
      }
    }
    // O += P V
    for (int k = 0; k < 4; ++k) {
      const uint32_t weights[4] = {device::pack<BFloat16>(scores[2 * k][0], scores[2 * k][1]),
                                   device::pack<BFloat16>(scores[2 * k][2], scores[2 * k][3]),
                                   device::pack<BFloat16>(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                                   device::pack<BFloat16>(scores[2 * k + 1][2], scores[2 * k + 1][3])};
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t columns[4];
        device::ldmatrix_trans(columns, values + (k * 16 + lane % 16) * kStride + (pair * 2 + lane / 16) * kChunk);
        const uint32_t first[2] = {columns[0], columns[1]}, second[2] = {columns[2], columns[3]};
        device::mma_m16n8k16<BFloat16>(out[2 * pair], weights, first);
        device::mma_m16n8k16<BFloat16>(out[2 * pair + 1], weights, second);
      }
    }
    device::sync_block();
  }
  for (int half = 0; half < 2; ++half) {
    float sum = total[half];
    for (int offset = 1; offset < 4; offset *= 2) sum += device::shuffle_xor(sum, offset);
    const int row = warp * 16 + lane / 4 + half * 8;
    for (int column = 0; column < 8; ++column) {
      for (int i = 0; i < 2; ++i) {
        static_cast<float*>(a.out)[row * kHeadDim + column * 8 + lane % 4 * 2 + i] = out[column][2 * half + i] / sum;
      }
    }
  }
}

}  // namespace fastgen::kernels::attention

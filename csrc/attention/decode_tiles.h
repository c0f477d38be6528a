// Tile table of the decode kernel. Host code; the launch plan is in decode_plan.h.
//
// Few queries against many keys: the time is that of reading keys and values once. A warp has its own ring of
// ``stages`` tiles of ``keys`` keys, so that a block has warps * (stages - 1) of them in flight without a barrier:
//
//   dims 32: 16 KiB, with 4 to 5 blocks per multiprocessor    dims 64, 128, 256: 32 KiB    dims 192: 48 KiB
//
// A prediction: a multiprocessor of an H200 (4.8 TB/s over 132, 1.98 GHz) reads 18 bytes per cycle, so that 32 KiB in
// flight hide a latency of 1780 cycles.
#pragma once

#include "attention/tiles.h"

namespace fastgen::attention {

// Compiled head dims of the decode kernel. Wider ones take the forward kernel.
constexpr Dims kDecodeHeadDims[] = {{32, 32}, {64, 64}, {128, 128}, {192, 192}, {256, 256}};

constexpr int kDecodeRows = kFragmentRows;  // of a block: queries of the heads that share a key head
constexpr int kDecodeExtraFloats = 8;       // after each row of sums in shared memory: no bank conflicts

struct DecodeShape {
  int warps;  // maximum; problems with few keys launch fewer
  int keys;   // of a tile
  int stages;
};

struct DecodeRow {
  Dims dims;  // maximum
  DecodeShape shape;
};

// clang-format off
//                               dims        warps keys stages
constexpr DecodeRow kDecode16[] = {{{ 64,  64}, {4, 32, 2}},
                                   {{128, 128}, {4, 16, 2}},
                                   {{192, 192}, {2, 16, 3}},
                                   {{256, 256}, {2, 16, 2}}};
constexpr DecodeRow kDecode32[] = {{{ 64,  64}, {4, 16, 2}},
                                   {{128, 128}, {4, 8,  2}},
                                   {{192, 192}, {2, 8,  3}},
                                   {{256, 256}, {2, 8,  2}}};
// clang-format on

constexpr DecodeShape decode_shape(Dims dims, int element_size) {
  for (int i = 0; i < length(kDecode16); ++i) {
    if (holds(kDecode16[i].dims, dims)) return element_size == 4 ? kDecode32[i].shape : kDecode16[i].shape;
  }
  return {};
}

// Dynamic shared memory: the queries, the ring of each warp, then the maximum and the sum of weights of each warp's
// rows, and the inverse of the sum of all warps.
constexpr int decode_ring_bytes(Dims dims, int element_size) {
  const DecodeShape shape = decode_shape(dims, element_size);
  return shape.stages * shape.keys * (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size));
}
constexpr int decode_sums_bytes(Dims dims) {
  return kDecodeRows * (dims.value + kDecodeExtraFloats) * static_cast<int>(sizeof(float));
}
constexpr int decode_bytes(Dims dims, int element_size, int warps) {
  return kDecodeRows * row_bytes(dims.key, element_size) + warps * decode_ring_bytes(dims, element_size) +
         (warps + 1) * 2 * kDecodeRows * static_cast<int>(sizeof(float));
}

constexpr bool all_decode_fit() {
  for (const int size : {2, 4}) {
    for (const Dims dims : kDecodeHeadDims) {
      const DecodeShape shape = decode_shape(dims, size);
      if (decode_bytes(dims, size, shape.warps) > kSharedLimit) return false;
      if (decode_sums_bytes(dims) > decode_ring_bytes(dims, size)) return false;
    }
  }
  return true;
}
static_assert(all_decode_fit(), "rings fit every GPU from sm_80 on, and a warp's sums fit its ring");

}  // namespace fastgen::attention

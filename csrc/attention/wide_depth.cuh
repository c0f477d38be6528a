// What the kernels of tangents and second derivatives of wide heads share. A block owns 16 rows, and its eight warps
// divide the depth of all products: warp w has an eighth of the columns of the owned rows in registers, from beginning
// to end, and multiplies them by the same columns of a tile of the other operand. Each thread adds the eight partial
// sums of one score and computes what depends on that score alone. The weights are the left operand of every warp, for
// an eighth of the columns of the result.
//
//            head dim                        scores                          columns of the result
//        +----+----+-----+----+            +--------+                        +----+----+-----+----+
//  rows  | w0 | w1 | ... | w7 |  partial   | one of |  weights -> shared     | w0 | w1 | ... | w7 |
//        +----+----+-----+----+  sums ->   | each   |  memory                +----+----+-----+----+
//  tile  | w0 | w1 | ... | w7 |  shared    | thread |
//        +----+----+-----+----+  memory    +--------+
#pragma once

#include "attention/dropout.cuh"
#include "attention/scheduler.cuh"
#include "attention/softcap.cuh"
#include "attention/softmax.cuh"
#include "device/barrier.cuh"
#include "device/bits.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"

namespace fastgen::attention {

// A warp's columns of the owned rows, as left operands.
template <typename T, int kColumns>
struct OwnedRows {
  static constexpr int kSteps = kColumns / Product<T>::kDepth;
  uint32_t bits[kSteps][4] = {};

  // ``corner``: row 0, the warp's first column. Zeros from row ``rows`` and from column ``columns`` on.
  __device__ __forceinline__ void load(const T* corner, int64_t stride, int rows, int columns) {
    constexpr int kDepth = Product<T>::kDepth, kWord = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane_row() + i % 2 * 8;
        const int column = step * kDepth + static_cast<int>(threadIdx.x % 4) * kWord + i / 2 * (kDepth / 2);
        if (row < rows && column < columns) {
          bits[step][i] = *reinterpret_cast<const uint32_t*>(corner + row * stride + column);
        }
      }
    }
  }
  __device__ __forceinline__ Factor<T> factor(int step, bool exact) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = sizeof(T) == 4 ? device::opaque(bits[step][i]) : bits[step][i];
    Factor<T> left;
    left.set(words, exact);
    return left;
  }
};

// Right operands of all rows of a tile: 16 rows of one k step in 16 bits, 8 rows of two k steps in float32.
template <typename T>
struct Strip {
  static constexpr int kColumns = 16, kTiles = kWideIterated<T> / 8;
  Factor<T> factor;

  template <int kWidth>
  __device__ __forceinline__ Strip(const Tile<T, kWidth>& tile, int column, bool exact) {
    uint32_t loaded[4];
    if constexpr (kTiles == 1) {
      load_across_deep(loaded, tile.at(0, column), Tile<T, kWidth>::kStride);
    } else {
      load_across(loaded, tile.at(0, column), Tile<T, kWidth>::kStride);
    }
    factor.set(loaded, exact);
  }

  // sums += the same columns of ``left`` times these.
  template <int kWidth>
  __device__ __forceinline__ void multiply(float (&sums)[kTiles][4], const OwnedRows<T, kWidth>& left, int strip,
                                           bool exact) const {
    using P = Product<T>;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      P::multiply(sums[kTiles == 1 ? 0 : i], left.factor(kTiles == 1 ? 2 * strip + i : strip, exact), factor, i, exact);
    }
  }
};

// The score of a thread: of an owned row and a column of the tile. Eight consecutive threads have consecutive columns
// of a row. Where scores are fewer than threads, the last warps have none.
template <typename T>
struct ScorePlace {
  static constexpr int kBlock = 8 * kWideOwned;  // scores in eight columns
  int number = static_cast<int>(threadIdx.x);
  int row = number % kBlock / 8, column = number / kBlock * 8 + number % 8;

  __device__ __forceinline__ bool exists() const { return column < kWideIterated<T>; }
};

// Shared memory: partial sums of kKinds products, [kind][warp][score], then a word per warp. Each thread overwrites
// partial sums that it has read with its weights.
template <typename T, int kKinds>
struct WideExchange {
  static constexpr int kScores = kWideOwned * kWideIterated<T>, kTiles = kWideIterated<T> / 8;
  static constexpr int kBytes = wide_exchange_bytes(kKinds, sizeof(T));

  static __device__ __forceinline__ float* part(int kind, int warp) {
    return reinterpret_cast<float*>(device::dynamic_shared()) + (kind * kWideWarps + warp) * kScores;
  }
  static __device__ __forceinline__ uint32_t* words() { return reinterpret_cast<uint32_t*>(part(kKinds, 0)); }

  static __device__ __forceinline__ void store(int kind, const float (&sums)[kTiles][4]) {
    float* const to = part(kind, static_cast<int>(threadIdx.x / 32));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t two[2] = {float_to_bits(sums[tile][2 * half]), float_to_bits(sums[tile][2 * half + 1])};
        device::store_words(to + (tile * kWideOwned + half * 8 + lane_row()) * 8 + lane_column(), two);
      }
    }
  }
  // Of this thread's score.
  static __device__ __forceinline__ float sum(int kind) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWideWarps; ++warp) sum += part(kind, warp)[threadIdx.x];
    return sum;
  }

  // In the place of the sums of ``kind`` from warp 0, of eight threads that have the eight weights. In float32, the
  // order of the columns is that of load_down.
  static __device__ __forceinline__ void store_weight(int kind, float weight) {
    const int at = static_cast<int>(threadIdx.x % 8);
    T* const to = reinterpret_cast<T*>(part(kind, 0) + threadIdx.x / 8 * 8);
    to[sizeof(T) == 4 ? at % 2 * 4 + at / 2 : at] = device::from_float<T>(weight);
  }
  static __device__ __forceinline__ Factor<T> weights(int kind, bool exact) {
    const int lane = threadIdx.x % 32, row = lane % 16, half = lane / 16;
    uint32_t loaded[4];
    device::ldmatrix(loaded, part(kind, 0) + row * 8 + half * (sizeof(T) == 4 ? 4 : ScorePlace<T>::kBlock));
    Factor<T> left;
    left.set(loaded, exact);
    return left;
  }

  // Which columns any row attends to, from the threads with a score.
  static __device__ __forceinline__ void store_attended(bool visible) {
    uint32_t columns = device::ballot(visible);
    columns |= columns >> 16, columns |= columns >> 8;
    if (threadIdx.x % 32 == 0) words()[threadIdx.x / 32] = columns & 0xffu;
  }
};

// The columns of a tile, as rows of a right operand, that any row attends to: those that are 0 times a weight of 0 even
// if they are inf or NaN.
template <typename T>
struct Attended {
  uint32_t keep[2];  // of the registers of load_down

  __device__ __forceinline__ explicit Attended(const uint32_t* words) {
    constexpr int kWarps = kWideOwned * 8 / 32;  // with scores of the same eight columns
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int block = sizeof(T) == 4 ? 0 : i;
      uint32_t columns = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) columns |= words[block * kWarps + warp];
      columns >>= lane_column();
      if constexpr (sizeof(T) == 4) {
        keep[i] = (columns >> i & 1u) != 0 ? ~0u : 0u;
      } else {
        keep[i] = ((columns & 1u) != 0 ? 0x0000ffffu : 0u) | ((columns & 2u) != 0 ? 0xffff0000u : 0u);
      }
    }
  }

  // sums += weights * the columns of ``right`` from ``column`` on.
  template <int kWidth, int kColumnTiles>
  __device__ __forceinline__ void multiply(float (&sums)[1][kColumnTiles][4], const Factor<T>& weights,
                                           const Tile<T, kWidth>& right, int column, bool exact) const {
    using P = Product<T>;
    const Factor<T> left[1] = {weights};
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; tile += P::kGroup) {
      Factor<T> b[P::kGroup / 2];
#pragma unroll
      for (int pair = 0; pair < P::kGroup / 2; ++pair) {
        uint32_t loaded[4];
        P::load_down(loaded, right.at(0, column + (tile + 2 * pair) * 8), Tile<T, kWidth>::kStride);
#pragma unroll
        for (int i = 0; i < 4; ++i) loaded[i] &= keep[i % 2];
        b[pair].set(loaded, exact);
      }
      P::multiply(sums, tile, left, b, exact);
    }
  }
};

// One score and its tangent.
struct WideScore {
  float product, tangent;   // q.k and Gq.k + q.Gk
  float weight, direction;  // P and W
  bool visible;
  bool clears;  // whether what is multiplied by a weight of 0 is 0, even if it is inf or NaN

  // ``inside``: the window and the ends of query and keys. ``shift``: of the query's row, see weight().
  template <typename T>
  __device__ __forceinline__ WideScore(float product, float tangent, const Problem& p, bool inside,
                                       const HeadMask<T>& mask, const HeadMask<T>& mask_tangent, int query, int key,
                                       float shift)
      : product(product), tangent(tangent), visible(inside) {
    if (visible && mask.kind == MaskKind::kBool) visible = *mask.template entry<unsigned char>(query, key) != 0;
    float score = product, scale = p.scale * kLog2e;
    direction = tangent * p.scale;
    if (is_capped(p)) {
      const CappedScore capped(product, p);
      score = capped.score(p), scale = 1.0f, direction *= capped.derivative;
    }
    if (!(scale > 0.0f) || mask.is_float()) score *= scale, scale = 1.0f;
    if (visible && mask.is_float()) {
      mask.with_float_entries([&]<typename Entry>() {
        const float entry = device::to_float(*mask.template entry<Entry>(query, key));
        visible = entry != -INFINITY;
        score = mask.added(score, entry);
      });
    }
    if (visible && mask_tangent.kind != MaskKind::kNone) {
      mask_tangent.with_float_entries(
          [&]<typename Entry>() { direction += device::to_float(*mask_tangent.template entry<Entry>(query, key)); });
    }
    if (!visible) score = -INFINITY, direction = 0.0f;
    weight = attention::weight(score, scale, shift);
    clears = !visible || mask.kind != MaskKind::kNone;
  }
};

}  // namespace fastgen::attention

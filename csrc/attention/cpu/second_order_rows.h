// The arithmetic between the products of the tangent and of the second order, one row of one block of scores at a time:
//
//   begin    P = e^(S - lse), and the block's part of the row's sums
//   finish   w and r from the sums
//   end      from P, W, dP and C: Pt keep and P keep, dS, dS2
//
// Every block is read and written twice, once beside the products before and once beside those after.
#pragma once

#include "attention/cpu/rows.h"

namespace fastgen::cpu {

// One row of a block: ``width`` columns.
struct RowOfBlock {
  float *scores, *direction, *grads, *cross;  // S, W, dO V^T, dO Gv^T; the last two may be absent
  const float* keep;                          // dropout's factors, may be absent
  int64_t width;
};

// Sums over a row. W is taken relative to ``shift``, its mean in the first block: sums that cancel stay small where all
// directions of a row have a large part in common.
template <int kWidth>
struct RowSums {
  enum { kTotal, kOffset, kSecond, kGrads, kCount };  // of P; P (W - shift); P keep ((W - shift) dP + C); P keep dP
  Sums<kWidth> of[kCount] = {Sums<kWidth>(0.0f), Sums<kWidth>(0.0f), Sums<kWidth>(0.0f), Sums<kWidth>(0.0f)};
  float shift = 0.0f;
};

struct RowResults {
  float inverse, mean, second;  // 1 / rowsum(e^(S - lse)), w, r
};

template <int kWidth, bool kKeep, bool kGrads, bool kCross>
FASTGEN_HOST_DEVICE void begin_row(const RowOfBlock& t, bool is_first, float lse, RowSums<kWidth>& sums) {
  using Floats = Vector<kWidth>;
  for (int64_t j = 0; j < t.width; j += kWidth) {
    Floats weight = vector_at<kWidth>(t.scores + j) - lse;
    exp_vector<kWidth>(weight);
    vector_at<kWidth>(t.scores + j) = weight;
  }
  if (is_first) {
    Sums<kWidth> total(0.0f), mean(0.0f);
    for (int64_t j = 0; j < t.width; j += kWidth) {
      total.even += vector_at<kWidth>(t.scores + j);
      mean.even += vector_at<kWidth>(t.scores + j) * vector_at<kWidth>(t.direction + j);
    }
    const float of_block = total.result();
    sums = {}, sums.shift = of_block == 0.0f ? 0.0f : mean.result() / of_block;
  }
  RowSums<kWidth> local = sums;  // in registers
  const auto add = [&](int64_t j, Floats Sums<kWidth>::* half) __attribute__((always_inline)) {
    const Floats weight = vector_at<kWidth>(t.scores + j), direction = vector_at<kWidth>(t.direction + j) - local.shift;
    local.of[local.kTotal].*half += weight;
    local.of[local.kOffset].*half += weight * direction;
    if constexpr (kGrads) {
      const Floats grads = vector_at<kWidth>(t.grads + j);
      Floats both = direction * grads, dropped = weight;
      if constexpr (kCross) both += vector_at<kWidth>(t.cross + j);
      if constexpr (kKeep) dropped *= vector_at<kWidth>(t.keep + j);
      local.of[local.kSecond].*half += dropped * both;
      local.of[local.kGrads].*half += dropped * grads;
    }
  };
  for (int64_t j = 0; j < t.width; j += 2 * kWidth) {
    add(j, &Sums<kWidth>::even), add(j + kWidth, &Sums<kWidth>::odd);
  }
  sums = local;
}

template <int kWidth>
FASTGEN_HOST_DEVICE RowResults finish_row(RowSums<kWidth>& sums) {
  // The logsumexp may be that of scores that were rounded otherwise: the weights are made to sum to 1.
  const float total = sums.of[sums.kTotal].result(), inverse = total == 0.0f ? 0.0f : 1.0f / total;
  const float offset = sums.of[sums.kOffset].result() * inverse;
  const float second = sums.of[sums.kSecond].result() - offset * sums.of[sums.kGrads].result();
  return {inverse, total == 0.0f ? 0.0f : sums.shift + offset, second * inverse};
}

// Overwrites scores with Pt keep; direction with P keep, or with dS2 where there are gradients and no cross; grads with
// dS; cross with dS2.
template <int kWidth, bool kKeep, bool kGrads, bool kCross>
FASTGEN_HOST_DEVICE void end_row(const RowOfBlock& t, const RowResults& row, float delta) {
  using Floats = Vector<kWidth>;
  for (int64_t j = 0; j < t.width; j += kWidth) {
    Floats &scores = vector_at<kWidth>(t.scores + j), &direction = vector_at<kWidth>(t.direction + j);
    const Floats weight = scores * row.inverse, centred = direction - row.mean;
    Floats dropped = weight, grad = {}, crossed = {};
    if constexpr (kGrads) grad = vector_at<kWidth>(t.grads + j);
    if constexpr (kCross) crossed = vector_at<kWidth>(t.cross + j);
    if constexpr (kKeep) {
      const Floats factor = vector_at<kWidth>(t.keep + j);
      dropped *= factor, grad *= factor, crossed *= factor;
    }
    scores = dropped * centred;
    if constexpr (kGrads) {
      const Floats first = weight * (grad - delta), second = centred * first + weight * (crossed - row.second);
      vector_at<kWidth>(t.grads + j) = first;
      if constexpr (kCross) vector_at<kWidth>(t.cross + j) = second;
      direction = kCross ? dropped : second;
    } else {
      direction = dropped;
    }
  }
}

}  // namespace fastgen::cpu

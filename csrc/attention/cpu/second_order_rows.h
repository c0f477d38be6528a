// The arithmetic between the products of the tangent and of the second order, one row of one block of scores at a time:
//
//   begin    P = e^(S - lse), Y = P (W - shift), and the block's part of the row's sums
//   finish   w and the last steps of O' from the sums
//   end      from P, Y, dP and C: Pt keep, dS, dS2
#pragma once

#include "attention/cpu/rows.h"

namespace fastgen::cpu {

// Sums over a row. W is taken relative to ``shift``, its mean in the first block with a weight: sums that cancel stay
// small where all directions of a row have a large part in common.
template <int kWidth>
struct RowSums {
  Sums<kWidth> total = Sums<kWidth>(0.0f), offset = Sums<kWidth>(0.0f);  // of P, of Y
  float shift = 0.0f;
  bool shifted = false;
};

struct RowResults {
  float inverse = 0.0f, offset = 0.0f, mean = 0.0f;  // 1 / rowsum(e^(S - lse)), w - shift, w
  float second = 0.0f;                               // r
};

// One row of a block before the products with values: ``width`` columns.
struct FirstRow {
  float *scores, *direction;                  // S and W, overwritten with P and Y
  const float* keep;                          // dropout's factors, may be absent
  float *dropped_scores, *dropped_direction;  // with dropout: P keep and Y keep, which may be where P and Y are
  int64_t width;
};

template <int kWidth, bool kKeep>
FASTGEN_HOST_DEVICE void begin_row(const FirstRow& t, float lse, RowSums<kWidth>& sums) {
  using Floats = Vector<kWidth>;
  for (int64_t j = 0; j < t.width; j += kWidth) {
    Floats weight = vector_at<kWidth>(t.scores + j) - lse;
    exp_of_weight<kWidth>(weight);
    vector_at<kWidth>(t.scores + j) = weight;
  }
  if (!sums.shifted) {
    Floats total = {}, mean = {};
    for (int64_t j = 0; j < t.width; j += kWidth) {
      total += vector_at<kWidth>(t.scores + j);
      mean += vector_at<kWidth>(t.scores + j) * vector_at<kWidth>(t.direction + j);
    }
    const float of_block = fold<kWidth, true>(total);
    if (of_block != 0.0f) sums.shift = fold<kWidth, true>(mean) / of_block, sums.shifted = true;
  }
  RowSums<kWidth> local = sums;  // in registers
  const auto add = [&](int64_t j, Floats Sums<kWidth>::* half) __attribute__((always_inline)) {
    const Floats weight = vector_at<kWidth>(t.scores + j);
    const Floats offset = weight * (vector_at<kWidth>(t.direction + j) - local.shift);
    local.total.*half += weight, local.offset.*half += offset;
    vector_at<kWidth>(t.direction + j) = offset;
    if constexpr (kKeep) {
      const Floats factor = vector_at<kWidth>(t.keep + j);
      vector_at<kWidth>(t.dropped_scores + j) = weight * factor;
      vector_at<kWidth>(t.dropped_direction + j) = offset * factor;
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
  const float total = sums.total.result();
  if (total == 0.0f) return {};
  RowResults row;
  row.inverse = 1.0f / total, row.offset = sums.offset.result() * row.inverse, row.mean = sums.shift + row.offset;
  return row;
}

// The same row of a block before the products of gradients.
struct SecondRow {
  const float *weights, *keep;       // P; dropout's factors, may be absent
  float *direction, *grads, *cross;  // Y, dO V^T, dO Gv^T, overwritten with Pt keep, dS, dS2
  int64_t width;
};

// kCross: cross has dO Gv^T, which is zero otherwise.
template <int kWidth, bool kKeep, bool kCross>
FASTGEN_HOST_DEVICE void end_row(const SecondRow& t, const RowResults& row, float delta) {
  using Floats = Vector<kWidth>;
  for (int64_t j = 0; j < t.width; j += kWidth) {
    Floats &direction = vector_at<kWidth>(t.direction + j), &grads = vector_at<kWidth>(t.grads + j);
    Floats& cross = vector_at<kWidth>(t.cross + j);
    const Floats weight = vector_at<kWidth>(t.weights + j) * row.inverse;
    const Floats tangent = direction * row.inverse - weight * row.offset;
    Floats grad = grads, crossed = {};
    if constexpr (kCross) crossed = cross;
    if constexpr (kKeep) {
      const Floats factor = vector_at<kWidth>(t.keep + j);
      direction = tangent * factor, grad *= factor, crossed *= factor;
    } else {
      direction = tangent;
    }
    grad -= delta;
    grads = weight * grad;
    cross = tangent * grad + weight * (crossed - row.second);
  }
}

}  // namespace fastgen::cpu

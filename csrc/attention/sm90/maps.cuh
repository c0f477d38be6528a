// The tensor maps of the operands.
#pragma once

#include "attention/sm90/plan.h"
#include "device/tensor_copy.cuh"

namespace fastgen::attention::sm90 {

struct ForwardMaps {
  device::TensorMap query, key, value;
};

// Whether an operand has a tensor map. Dims of size 1 have stride 0 (operands.h), and others must not: that is a tensor
// expanded without a copy.
inline bool has_map(const Operand& operand, int batch, int heads, int rows) {
  constexpr int64_t kMost = int64_t{1} << 38;  // elements of 2 bytes: less than 2^40 bytes, with room
  const auto fits = [](int64_t stride, int size) { return size == 1 || (stride > 0 && stride < kMost); };
  return fits(operand.batch, batch) && fits(operand.head, heads) && fits(operand.row, rows);
}

// Boxes of ``box_rows`` rows and 64 columns. Coordinates: column, row, head, batch. Rows and columns past the end are
// zeros.
template <typename T>
device::TensorMap map_of(const Operand& operand, int batch, int heads, int rows, int dim, int box_rows) {
  const auto bytes = [](int64_t stride, int size) {
    return static_cast<uint64_t>(size == 1 ? device::kTensorAlignment : stride * static_cast<int64_t>(sizeof(T)));
  };
  device::TensorLayout layout;
  layout.data = operand.data;
  const int sizes[] = {dim, rows, heads, batch};
  for (int i = 0; i < device::kTensorDims; ++i) layout.sizes[i] = static_cast<uint64_t>(sizes[i]);
  layout.strides[0] = bytes(operand.row, rows), layout.strides[1] = bytes(operand.head, heads);
  layout.strides[2] = bytes(operand.batch, batch);
  layout.box[0] = kPanelDim, layout.box[1] = static_cast<uint32_t>(box_rows);
  return device::tensor_map<T>(layout);
}

}  // namespace fastgen::attention::sm90

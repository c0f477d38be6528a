// Conversion of tensors to params: checks, copies of misaligned inputs, allocation of outputs.
#pragma once

#include <vector>

#include "common/operand_checks.h"
#include "projection/params.h"

namespace fastgen::projection {

inline bool is_aligned(const Tensor& tensor, int contiguous_dim) {
  const int64_t size = element_size(tensor), chunk = kAlignment / size;
  bool whole = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0 &&
               tensor.size(contiguous_dim) % chunk == 0 && tensor.stride(contiguous_dim) == 1;
  for (int dim = 0; dim < tensor.dim(); ++dim) {
    if (dim != contiguous_dim && tensor.size(dim) > 1) whole = whole && tensor.stride(dim) * size % kAlignment == 0;
  }
  return whole;
}

inline void check_operand(const Tensor& tensor, const char* name, int dims, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, ": expected ", dims, " dims, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": expected the dtype of x");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected the device of x");
  STD_TORCH_CHECK(is_backed(tensor), name, ": expected a tensor whose storage holds its elements");
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) same = same && tensor.size(dim++) == size;
  STD_TORCH_CHECK(same, name, ": expected ", text_of(shape), ", got ", text_of(tensor.sizes()));
}

inline void check_channels(int64_t channels, const char* name, const Tensor& like) {
  const int64_t chunk = kAlignment / element_size(like);
  STD_TORCH_CHECK(channels > 0 && channels % chunk == 0, name,
                  ": kernels take channels and head dims that are multiples of ", chunk, ", got ", channels);
}

// A contiguous copy with the last dim padded with zeros to a multiple of 16 bytes.
inline Tensor aligned_copy(const Tensor& tensor) {
  const int64_t chunk = kAlignment / element_size(tensor), last = tensor.dim() - 1;
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim <= last; ++dim) sizes.push_back(tensor.size(dim));
  sizes.back() = ceil_div(sizes.back(), chunk) * chunk;
  Tensor copy = torch::stable::new_zeros(tensor, sizes);
  Tensor part = torch::stable::narrow(copy, last, 0, tensor.size(last));
  torch::stable::copy_(part, tensor);
  return copy;
}

// An input, read in place if aligned; otherwise an owned copy.
class Read {
 public:
  Read(const Tensor& tensor, const char* name, int dims, const Tensor& like) : tensor_(tensor) {
    check_operand(tensor, name, dims, like);
    if (tensor.numel() > 0 && !is_aligned(tensor, dims - 1)) tensor_ = aligned_copy(tensor);
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
};

inline Matrix one_part(const Tensor& tensor, int64_t batch, int64_t head, int64_t token, int64_t dim, int64_t channels,
                       int64_t channel) {
  Matrix matrix;
  matrix.parts[0] = {const_cast<void*>(tensor.const_data_ptr()), batch, head, token, 0, checked_int(dim, "head dim")};
  matrix.count = 1, matrix.channels = checked_int(channels, "channels"), matrix.channel = channel;
  return matrix;
}

// (B, N, C), or (B, C, N) with channels first, N padded.
inline Matrix flat_matrix(const Tensor& tensor, bool channels_first) {
  const int64_t channels = tensor.size(channels_first ? 1 : 2);
  const int64_t token = channels_first ? 1 : tensor.stride(1), channel = channels_first ? tensor.stride(1) : 1;
  return one_part(tensor, tensor.stride(0), channels * channel, token, channels, channels, channel);
}

// (B, H, N, D).
inline Matrix head_matrix(const Tensor& tensor) {
  return one_part(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.size(3),
                  tensor.size(1) * tensor.size(3), 1);
}

inline Matrix packed(const std::vector<Matrix>& parts) {
  STD_TORCH_CHECK(!parts.empty() && parts.size() <= kMostParts, "heads: kernels take up to ", kMostParts,
                  " parts, got ", parts.size());
  Matrix matrix = parts[0];
  matrix.count = 0, matrix.channels = 0;
  for (const Matrix& part : parts) {
    Part& own = matrix.parts[matrix.count++] = part.parts[0];
    own.first = matrix.channels;
    matrix.channels = checked_int(int64_t{matrix.channels} + part.channels, "channels");
  }
  return matrix;
}

// Numbers tokens across the batch if the strides of all matrices allow it, so that tiles are full for any sequence
// length.
template <typename... Matrices>
Tokens number_tokens(int64_t batch, int64_t count, const Matrices&... matrices) {
  const Tokens own = {checked_int(batch, "batch"), checked_int(count, "length"), static_cast<int>(count)};
  if (batch * count > INT32_MAX) return own;
  const auto fits = [&](const Matrix& matrix) {
    for (int i = 0; i < matrix.count; ++i) {
      if (matrix.channel != 1 || matrix.parts[i].batch != count * matrix.parts[i].token) return false;
    }
    return true;
  };
  if (batch == 1 || (fits(matrices) && ...)) return {1, static_cast<int>(batch * count), static_cast<int>(count)};
  return own;
}

}  // namespace fastgen::projection

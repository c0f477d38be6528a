// Conversion of tensors to params: checks, copies of misaligned inputs, allocation of outputs.
#pragma once

#include <optional>

#include "attention/params.h"
#include "attention/tiles.h"
#include "common/operand_checks.h"

namespace fastgen::attention {

inline int64_t aligned_dim(const Tensor& tensor) {
  const int64_t chunk = kAlignment / element_size(tensor);
  return ceil_div(tensor.size(3), chunk) * chunk;
}

inline bool is_aligned(const Tensor& tensor) {
  bool whole = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0;
  for (int dim = 0; dim < 3; ++dim) {
    whole = whole && (tensor.size(dim) <= 1 || tensor.stride(dim) * element_size(tensor) % kAlignment == 0);
  }
  return whole && aligned_dim(tensor) == tensor.size(3);
}

// An input, read in place if its rows are multiples of 16 bytes; otherwise an owned copy, padded with zeros.
class Read {
 public:
  Read(const Tensor& tensor, const char* name, const Tensor& query) : tensor_(tensor) {
    STD_TORCH_CHECK(tensor.dim() == 4 && (tensor.numel() == 0 || tensor.size(3) <= 1 || tensor.stride(3) == 1), name,
                    ": expected four dims, the last of them contiguous");
    STD_TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), name, ": expected the dtype of query");
    STD_TORCH_CHECK(tensor.device() == query.device(), name, ": expected the device of query");
    STD_TORCH_CHECK(is_backed(tensor), name, ": expected a tensor whose storage holds its elements");
    if (is_aligned(tensor)) return;
    tensor_ = torch::stable::new_zeros(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), aligned_dim(tensor)});
    Tensor part = torch::stable::narrow(tensor_, 3, 0, tensor.size(3));
    torch::stable::copy_(part, tensor);
  }
  // A dim of size 1 has stride 0: its own may not be a multiple of 16 bytes, and cp.async wants aligned addresses also
  // for the rows past the end, which it does not read.
  Operand operand() const {
    const auto stride = [&](int dim) { return tensor_.size(dim) > 1 ? tensor_.stride(dim) : 0; };
    return {tensor_.const_data_ptr(), stride(0), stride(1), stride(2)};
  }
  int64_t dim() const { return tensor_.size(3); }

 private:
  Tensor tensor_;
};

// The output of the forward pass, or a tensor of its shape.
inline Read read_out(const Tensor& tensor, const char* name, const Tensor& query, const Tensor& value) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == query.size(0) && tensor.size(1) == query.size(1) &&
                      tensor.size(2) == query.size(2) && tensor.size(3) == value.size(3),
                  name, ": expected the dims of query, and value's last");
  return Read(tensor, name, query);
}

// An optional input of the shape of ``like``.
class MaybeRead {
 public:
  MaybeRead(const MaybeTensor& tensor, const char* name, const Tensor& like, const Tensor& query) {
    if (!tensor.has_value()) return;
    for (int64_t dim = 0; dim < 4; ++dim) {
      STD_TORCH_CHECK(tensor->dim() == 4 && tensor->size(dim) == like.size(dim), name,
                      ": expected the shape of what it is the tangent of");
    }
    read_.emplace(*tensor, name, query);
  }
  Operand operand() const { return read_.has_value() ? read_->operand() : Operand{}; }

 private:
  std::optional<Read> read_;
};

// An output (B, H, N, D), in the memory layout (B, N, H, D) with rows_first: the layout of the operator's fake. If rows
// are not multiples of 16 bytes, the kernel writes to a padded tensor, and finish() copies.
class Written {
 public:
  Written(const Tensor& like, int64_t dim, bool rows_first)
      : tensor_(allocate(like, dim, rows_first)),
        target_(is_aligned(tensor_) ? tensor_ : allocate(like, aligned_dim(tensor_), false)) {}

  Result result() { return {target_.mutable_data_ptr(), target_.stride(0), target_.stride(1), target_.stride(2)}; }
  Tensor finish() {
    if (target_.size(3) != tensor_.size(3)) {
      torch::stable::copy_(tensor_, torch::stable::narrow(target_, 3, 0, tensor_.size(3)));
    }
    return tensor_;
  }
  Tensor zero() {
    torch::stable::zero_(tensor_);
    return tensor_;
  }

 private:
  static Tensor allocate(const Tensor& like, int64_t dim, bool rows_first) {
    const int64_t heads = like.size(1), rows = like.size(2);
    return empty_strided<4>(like, {like.size(0), heads, rows, dim},
                            {heads * rows * dim, rows_first ? dim : rows * dim, rows_first ? heads * dim : dim, 1},
                            like.scalar_type());
  }
  Tensor tensor_, target_;
};

// Whether the memory layout of (B, H, N, D) is (B, N, H, D).
inline bool rows_first(const Tensor& tensor) { return tensor.size(1) > 1 && tensor.stride(1) < tensor.stride(2); }

// CPU tensors: in the emulator, where outputs have the layout of the CPU implementation.
inline bool on_host(const Tensor& tensor) { return !tensor.device().is_cuda(); }

inline MaskKind mask_kind(const Tensor& mask, const Tensor& query) {
  if (mask.scalar_type() == ScalarType::Bool) return MaskKind::kBool;
  return mask.scalar_type() == ScalarType::Float ? MaskKind::kFloat32 : MaskKind::kLikeQuery;
}

// The mask in a dtype that kernels accept: bool, float32 or the query's. Other floating dtypes are converted to
// float32.
inline MaybeTensor readable(const MaybeTensor& mask, const Tensor& query) {
  if (!mask.has_value()) return mask;
  const ScalarType dtype = mask->scalar_type();
  if (dtype == ScalarType::Bool || dtype == ScalarType::Float || dtype == query.scalar_type()) return mask;
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "mask: expected bool, float64, float32, float16 or bfloat16");
  return torch::stable::to(*mask, ScalarType::Float);
}

inline Mask mask_of(const MaybeTensor& mask, const Tensor& query, int64_t keys, const char* name = "mask") {
  if (!mask.has_value()) return {};
  const int64_t sizes[4] = {query.size(0), query.size(1), query.size(2), keys};
  int64_t strides[4];
  STD_TORCH_CHECK(mask->dim() == 4, name, ": expected four dims");
  STD_TORCH_CHECK(mask->device() == query.device(), name, ": expected the device of query");
  STD_TORCH_CHECK(is_backed(*mask), name, ": expected a tensor whose storage holds its elements");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(mask->size(i) == sizes[i] || mask->size(i) == 1, name, ": expected dim ", i, " to be 1 or ",
                    sizes[i], ", got ", mask->size(i));
    strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  return {mask->const_data_ptr(), mask_kind(*mask, query), strides[0], strides[1], strides[2], strides[3]};
}

struct Options {
  double dropout_p;
  int64_t window_left, window_right;
  double scale, softcap;
  bool allow_tf32;
};

// A bound of the kernels. -1: unbounded. Beside packed sequences a negative bound -b is given as -b - 1.
inline int window_bound(int64_t bound) {
  if (bound == -1) return kUnbounded;
  // Bounds beyond all keys are equivalent.
  return static_cast<int>(bound < -1          ? (bound > -INT32_MAX ? bound + 1 : -INT32_MAX)
                          : bound < INT32_MAX ? bound
                                              : INT32_MAX);
}

// (2, sequences + 1) int32. Their values are not read here, which would wait for the device.
inline Sequences sequences_of(const Tensor& sequences, const MaybeTensor& mask, const Tensor& query,
                              const Tensor& key) {
  check_tensor(sequences, "sequences", 2, ScalarType::Int, query);
  const int64_t count = sequences.size(1) - 1;
  STD_TORCH_CHECK(sequences.size(0) == 2 && count >= 0 && (count == 0 || sequences.stride(1) == 1),
                  "sequences: expected (2, sequences + 1), contiguous in the last dim");
  STD_TORCH_CHECK(query.size(0) == 1, "query: expected a batch of 1 beside sequences");
  STD_TORCH_CHECK(!mask.has_value(), "mask: expected None beside sequences, got a tensor");
  STD_TORCH_CHECK(count > 0 || (query.size(2) == 0 && key.size(2) == 0),
                  "sequences: expected at least one for the tokens of query and key, got 0");
  const int32_t* queries = sequences.const_data_ptr<int32_t>();
  return {queries, queries + sequences.stride(0), checked_int(count, "sequences")};
}

// Packed sequences: batch strides that are row strides, see Sequences.
template <typename... Operands>
void index_by_row(const Problem& problem, Operands&... operands) {
  if (problem.sequences.count > 0) ((operands.batch = operands.row), ...);
}

inline Problem problem_of(const Tensor& query, const Tensor& key, const Tensor& value, int64_t key_dim,
                          int64_t value_dim, const MaybeTensor& mask, const MaybeTensor& seed,
                          const MaybeTensor& sequences, const Options& options) {
  STD_TORCH_CHECK(key.size(0) == query.size(0) && key.size(3) == query.size(3) && value.size(0) == query.size(0) &&
                      value.size(1) == key.size(1) && value.size(2) == key.size(2),
                  "key, value: expected shapes that fit the query");
  STD_TORCH_CHECK(key.size(1) > 0 ? query.size(1) % key.size(1) == 0 : query.size(1) == 0,
                  "key: expected a number of heads that divides the query's");
  constexpr Dims largest = kLargestHeadDims;
  STD_TORCH_CHECK(key_dim <= largest.key && value_dim <= largest.value,
                  "query, value: kernels are compiled for head dims up to ", largest.key, " and ", largest.value,
                  ", got ", query.size(3), " and ", value.size(3));
  Problem problem;
  problem.batch = checked_int(query.size(0), "batch"), problem.heads = checked_int(query.size(1), "heads");
  problem.queries = checked_int(query.size(2), "queries"), problem.key_dim = static_cast<int>(key_dim);
  problem.key_heads = checked_int(key.size(1), "key heads"), problem.keys = checked_int(key.size(2), "keys");
  problem.value_dim = static_cast<int>(value_dim);
  check_probability(options.dropout_p, "dropout_p");
  STD_TORCH_CHECK(seed.has_value() || options.dropout_p == 0.0, "seed: expected one, because dropout_p is ",
                  options.dropout_p);
  STD_TORCH_CHECK(sequences.has_value() || (options.window_left >= -1 && options.window_right >= -1),
                  "window_left, window_right: expected >= 0, or -1 for unbounded, got ", options.window_left, " and ",
                  options.window_right);
  problem.window_left = window_bound(options.window_left), problem.window_right = window_bound(options.window_right);
  problem.scale = static_cast<float>(options.scale);
  check_softcap(options.softcap);
  problem.softcap = static_cast<float>(options.softcap);
  problem.inner_scale = options.softcap == 0.0 ? 0.0f : static_cast<float>(options.scale / options.softcap);
  problem.exact = !options.allow_tf32;
  problem.mask = mask_of(mask, query, key.size(2));
  if (sequences.has_value()) problem.sequences = sequences_of(*sequences, mask, query, key);
  if (seed.has_value()) {
    const int64_t count = seed->numel();
    check_seed(*seed, query.size(0), query);
    const int64_t rows_per_seed = query.size(0) / count * query.size(1) * query.size(2);
    problem.dropout = {seed->const_data_ptr<int64_t>(), rows_per_seed, static_cast<float>(options.dropout_p)};
  }
  return problem;
}

inline RowInput row_input(const Tensor& tensor, const char* name, const Tensor& query) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == query.size(0) && tensor.size(1) == query.size(1) &&
                      tensor.size(2) == query.size(2) && tensor.scalar_type() == ScalarType::Float &&
                      tensor.device() == query.device() && is_backed(tensor),
                  name, ": expected a float32 tensor (batch, heads, queries) on the query's device");
  return {tensor.const_data_ptr<float>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// One float per query row; on the CPU in the memory layout (B, N, H), as in torch's own kernels.
inline Tensor empty_rows(const Tensor& query) {
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2);
  const bool host = on_host(query);
  return empty_strided<3>(query, {batch, heads, rows}, {heads * rows, host ? 1 : rows, host ? heads : 1},
                          ScalarType::Float);
}
inline RowResult row_result(const Tensor& rows) {
  return {static_cast<float*>(rows.mutable_data_ptr()), rows.stride(0), rows.stride(1), rows.stride(2)};
}

// A gradient, in the layout that fastgen/ops/attention/blocked.py allocates.
inline Written gradient_of(const Tensor& of) { return Written(of, of.size(3), on_host(of) || rows_first(of)); }

}  // namespace fastgen::attention

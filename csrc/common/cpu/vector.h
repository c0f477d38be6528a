// Vector types of GCC and clang: elementwise operators, scalars broadcast.
#pragma once

namespace fastgen::cpu {

template <int kWidth>
using Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias)) = float;

}  // namespace fastgen::cpu

// Vectors of floats as GCC and clang know them: + and * work lane by lane, and a float stands for all lanes.
#pragma once

namespace fastgen::cpu {

template <int kWidth>
using Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias)) = float;

}  // namespace fastgen::cpu

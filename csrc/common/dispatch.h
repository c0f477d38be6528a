// Dispatch of run-time values to template arguments.
#pragma once

#include <type_traits>

#include "common/error.h"
#include "common/types.h"

namespace fastgen {

// Whether this library has kernels of a dtype: of all, unless the build leaves some out (FASTGEN_DTYPES).
constexpr bool is_compiled(DType dtype) {
  switch (dtype) {
#ifdef FASTGEN_WITHOUT_FLOAT32
    case DType::kFloat32: return false;
#endif
#ifdef FASTGEN_WITHOUT_FLOAT16
    case DType::kFloat16: return false;
#endif
#ifdef FASTGEN_WITHOUT_BFLOAT16
    case DType::kBFloat16: return false;
#endif
    default: return true;
  }
}

// Calls body(std::type_identity<T>{}). For a dtype that is not compiled it is not instantiated: its launchers have no
// definition.
template <typename Body>
void dispatch_dtype(DType dtype, Body&& body) {
  const auto call = [&]<DType kDType, typename T>() {
    if constexpr (is_compiled(kDType)) {
      body(std::type_identity<T>{});
    } else {
      throw Error("dtype: this library was built without its kernels (FASTGEN_DTYPES)");
    }
  };
  switch (dtype) {
    case DType::kFloat32: return call.template operator()<DType::kFloat32, float>();
    case DType::kFloat16: return call.template operator()<DType::kFloat16, Half>();
    case DType::kBFloat16: return call.template operator()<DType::kBFloat16, BFloat16>();
  }
}

template <typename Body>
void dispatch_bool(bool value, Body&& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

}  // namespace fastgen

// CUDA implementation of DeviceScope.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/torch_api.h"

namespace fastgen {

DeviceScope::DeviceScope(const Tensor& tensor) {
  const int32_t index = tensor.get_device_index();
  DeviceGuardHandle guard = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(index, &guard));
  guard_ = guard;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream_));
}

DeviceScope::~DeviceScope() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_)); }

}  // namespace fastgen

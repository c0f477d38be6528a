// CUDA implementation of DeviceScope.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/torch_api.h"

namespace fastgen {

DeviceScope::Guard::Guard(const Tensor& tensor) {
  DeviceGuardHandle guard = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(tensor.get_device_index(), &guard));
  handle = guard;
}

DeviceScope::Guard::~Guard() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(handle)); }

DeviceScope::DeviceScope(const Tensor& tensor) : guard_(tensor) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
}

}  // namespace fastgen

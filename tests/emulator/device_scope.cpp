// The device scope of an emulated library, in place of csrc/common/device_scope_cuda.cpp.
#include "common/torch_api.h"
#include "core/control.h"

namespace fastgen {

DeviceScope::Guard::Guard(const Tensor&) { emulator::enter_operator(); }
DeviceScope::Guard::~Guard() { emulator::leave_operator(); }
DeviceScope::DeviceScope(const Tensor& tensor) : guard_(tensor) {}

}  // namespace fastgen

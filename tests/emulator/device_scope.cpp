// The device scope of an emulated library, in place of csrc/common/device_scope_cuda.cpp.
#include "common/torch_api.h"
#include "core/control.h"

namespace fastgen {

DeviceScope::DeviceScope(const Tensor&) { emulator::enter_operator(); }
DeviceScope::~DeviceScope() { emulator::leave_operator(); }

}  // namespace fastgen

// CPU implementation of DeviceScope: one device, no streams.
#include "common/torch_api.h"

namespace fastgen {

DeviceScope::DeviceScope(const Tensor&) {}
DeviceScope::~DeviceScope() = default;

}  // namespace fastgen

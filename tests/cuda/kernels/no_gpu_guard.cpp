// torch built for a CPU stops where its C++ looks for the GPU of a fake tensor: this is one to find, which does nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::DeviceType;
static c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> nothing;
static c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, &nothing);

// What torch's CPU build asks of a CUDA device, answered for one that is not there.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include "memory.h"

namespace {

const c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;
c10::impl::DeviceGuardImplRegistrar guard_registrar(c10::DeviceType::CUDA, &guard);

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return guard.getDevice().index(); }
  c10::DeviceIndex getCurrentDevice() const override { return guard.getDevice().index(); }
  c10::DeviceIndex deviceCount() const override { return guard.deviceCount(); }
  int getNumGPUs() const override { return guard.deviceCount(); }
  bool isPinnedPtr(const void* data) const override { return megalite::dryrun::is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return megalite::dryrun::pinned_allocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return megalite::dryrun::allocator(); }
  void deviceSynchronize(c10::DeviceIndex) const override { megalite::dryrun::where("device synchronized"); }
};

}  // namespace

namespace at {
namespace {
using Creator = c10::Registerer<std::string, std::unique_ptr<CUDAHooksInterface>, CUDAHooksArgs>;
Creator hooks_registrar("CUDAHooks", CUDAHooksRegistry(), Creator::DefaultCreator<Hooks>);
}  // namespace
}  // namespace at

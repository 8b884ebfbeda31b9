#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <unordered_map>
#include <vector>

namespace megalite::dryrun {

namespace {

struct Block {
  int64_t size, place;
  at::Tensor content;
};

struct Event {
  int64_t size, place;  // negative: freed
};

std::mutex mutex;
std::unordered_map<uint64_t, Block> blocks;
std::map<int64_t, int64_t> at_begin;  // of the phase, bytes by place
std::vector<Event> events;            // of the phase
size_t peak_event = 0;
int64_t now = 0, peak = 0;
uint64_t next_address = uint64_t{1} << 46;  // of no process

std::map<const char*, size_t> pinned_blocks;
int64_t pinned = 0, pinned_peak = 0;

WhereAmI where_function = nullptr;

void free_block(void* address) {
  at::Tensor content;  // freed behind the lock
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(reinterpret_cast<uint64_t>(address));
  if (found == blocks.end()) return;
  now -= found->second.size;
  events.push_back({-found->second.size, found->second.place});
  content = std::move(found->second.content);
  blocks.erase(found);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device device(c10::DeviceType::CUDA, c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA)->getDevice().index());
    if (size == 0) return {nullptr, device};
    const int64_t place = where(current_operation());
    const int64_t rounded = static_cast<int64_t>((size + kRounding - 1) / kRounding * kRounding);
    std::lock_guard<std::mutex> lock(mutex);
    const uint64_t address = next_address;
    next_address += static_cast<uint64_t>(rounded);
    blocks[address] = {rounded, place, {}};
    now += rounded;
    events.push_back({rounded, place});
    if (now > peak) {
      peak = now;
      peak_event = events.size();
    }
    void* pointer = reinterpret_cast<void*>(address);
    return {pointer, pointer, &free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void*, const void*, std::size_t) const override {}
};

void free_pinned(void* pointer) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = pinned_blocks.find(static_cast<const char*>(pointer));
    pinned -= static_cast<int64_t>(found->second);
    pinned_blocks.erase(found);
  }
  c10::GetDefaultCPUAllocator()->raw_deallocate(pointer);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, c10::Device(c10::DeviceType::CPU)};
    void* pointer = c10::GetDefaultCPUAllocator()->raw_allocate(size);
    std::lock_guard<std::mutex> lock(mutex);
    pinned_blocks[static_cast<const char*>(pointer)] = size;
    pinned += static_cast<int64_t>(size);
    pinned_peak = std::max(pinned_peak, pinned);
    return {pointer, pointer, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* target, const void* source, std::size_t size) const override { default_copy_data(target, source, size); }
};

uint64_t address_of(const at::Tensor& tensor) {
  return reinterpret_cast<uint64_t>(tensor.storage().data());
}

}  // namespace

void set_where(WhereAmI function) { where_function = function; }
int64_t where(const char* kind) { return where_function ? where_function(kind) : 0; }

const char*& current_operation() {
  static thread_local const char* operation = "";
  return operation;
}

// Never destroyed: tensors may outlive what Python tears down at its end.
c10::Allocator* allocator() {
  static auto* const instance = new DeviceAllocator;
  return instance;
}

c10::Allocator* pinned_allocator() {
  static auto* const instance = new PinnedAllocator;
  return instance;
}

bool is_pinned(const void* data) {
  const auto* pointer = static_cast<const char*>(data);
  std::lock_guard<std::mutex> lock(mutex);
  auto found = pinned_blocks.upper_bound(pointer);
  return found != pinned_blocks.begin() && pointer < std::prev(found)->first + std::prev(found)->second;
}

Usage usage() {
  std::lock_guard<std::mutex> lock(mutex);
  return {now, peak, pinned_peak};
}

void reset_peak() {
  std::lock_guard<std::mutex> lock(mutex);
  at_begin.clear();
  for (const auto& [address, block] : blocks) at_begin[block.place] += block.size;
  events.clear();
  peak_event = 0;
  peak = now;
}

int64_t peak_place() {
  std::lock_guard<std::mutex> lock(mutex);
  return peak_event ? events[peak_event - 1].place : -1;
}

std::map<int64_t, int64_t> at_peak() {
  std::lock_guard<std::mutex> lock(mutex);
  auto bytes = at_begin;
  for (size_t i = 0; i < peak_event; ++i) bytes[events[i].place] += events[i].size;
  return bytes;
}

void know(const at::Tensor& tensor, const at::Tensor& content) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(address_of(tensor));
  if (found != blocks.end()) found->second.content = content;
}

const at::Tensor* known(const at::Tensor& tensor) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(address_of(tensor));
  if (found == blocks.end() || !found->second.content.defined()) return nullptr;
  return &found->second.content;
}

}  // namespace megalite::dryrun

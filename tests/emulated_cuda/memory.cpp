#include "memory.h"

#include <cstring>

namespace emulated {

namespace {

// Readers of a byte that are more than one thread. The number of their warp is added to SEVERAL_OF_WARP.
constexpr uint16_t OTHER_BLOCKS = 0xffff, SEVERAL_WARPS = 0xfffe, SEVERAL_OF_WARP = 0x8000;

int warp_of(int reader) { return reader >= SEVERAL_OF_WARP ? reader - SEVERAL_OF_WARP : reader / WARP; }

}  // namespace

void Memory::begin_launch() {
  if (tick_ > 1u << 31) {
    pages_.clear();
    for (Found& each : recent_) each = {};
    tick_ = 0;
  }
  launch_began_ = ++tick_;
}

void Memory::begin_block() {
  shared_.clear();
  block_began_ = last_barrier_ = ++tick_;
  for (uint32_t& each : warp_barriers_) each = tick_;
}

bool Memory::share(void* variable, size_t bytes) {
  size_t used = bytes;
  for (const Shared& each : shared_) {
    if (each.begin == variable) return true;
    used += each.bytes;
  }
  if (used > MOST_SHARED) return false;
  std::memset(variable, 0xff, bytes);
  shared_.push_back({static_cast<char*>(variable), bytes});
  return true;
}

bool Memory::is_shared(uintptr_t address) const {
  for (const Shared& each : shared_)
    if (address - reinterpret_cast<uintptr_t>(each.begin) < each.bytes) return true;
  return false;
}

const char* Memory::access(uintptr_t address, size_t bytes, bool write, int thread) {
  const bool in_shared = is_shared(address);
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = byte_at(address + i);
    if (in_shared && !write && byte.written < block_began_) return "shared memory that its block has not written";
    if (races_with_write(byte, thread, in_shared))
      return in_shared ? "shared memory that another thread has written without a barrier between"
                       : "global memory that another thread has written without a barrier between";
    if (write && races_with_reads(byte, thread, in_shared))
      return in_shared ? "shared memory that another thread has read without a barrier between"
                       : "global memory that another thread has read without a barrier between";
    if (write) {
      byte.written = tick_;
      byte.writer = static_cast<uint16_t>(thread);
    } else {
      note_read(byte, thread, in_shared);
    }
  }
  return nullptr;
}

Memory::Byte& Memory::byte_at(uintptr_t address) {
  const uintptr_t number = address / PAGE;
  Found& found = recent_[number % RECENT];
  if (found.number != number) {
    std::unique_ptr<Page>& page = pages_[number];
    if (!page) page = std::make_unique<Page>();
    found = {number, page.get()};
  }
  return found.page->bytes[address % PAGE];
}

// Whether `thread` has passed a barrier of its warp since `warp` did something at `then`.
bool Memory::after_warp_barrier(uint32_t then, int warp, int thread) const {
  return warp == thread / WARP && then < warp_barriers_[warp];
}

// Whether nothing orders the write to a byte before what `thread` does now. Blocks of a launch are never ordered; shared
// memory is another one for each of them.
bool Memory::races_with_write(const Byte& byte, int thread, bool in_shared) const {
  if (byte.written < block_began_) return !in_shared && byte.written >= launch_began_;
  if (byte.writer == thread || byte.written < last_barrier_) return false;
  return !after_warp_barrier(byte.written, byte.writer / WARP, thread);
}

bool Memory::races_with_reads(const Byte& byte, int thread, bool in_shared) const {
  if (byte.read < launch_began_) return false;
  if (byte.reader == OTHER_BLOCKS || byte.read < block_began_) return !in_shared;
  if (byte.reader == thread || byte.read < last_barrier_) return false;
  if (byte.reader == SEVERAL_WARPS) return true;
  return !after_warp_barrier(byte.read, warp_of(byte.reader), thread);
}

// Keeps of all that have read a byte as much as a later write must know.
void Memory::note_read(Byte& byte, int thread, bool in_shared) const {
  const bool by_other_blocks = byte.reader == OTHER_BLOCKS || byte.read < block_began_;
  if (!in_shared && byte.read >= launch_began_ && by_other_blocks) {
    byte.reader = OTHER_BLOCKS;
  } else if (byte.reader == thread || byte.read < last_barrier_) {
    byte.reader = static_cast<uint16_t>(thread);
  } else if (byte.reader == SEVERAL_WARPS || warp_of(byte.reader) != thread / WARP) {
    byte.reader = SEVERAL_WARPS;
  } else {
    const bool alone = after_warp_barrier(byte.read, warp_of(byte.reader), thread);
    byte.reader = static_cast<uint16_t>(alone ? thread : SEVERAL_OF_WARP + thread / WARP);
  }
  byte.read = tick_;
}

}  // namespace emulated

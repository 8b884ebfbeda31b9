// What threads of a kernel do to memory: who wrote and who read each byte last, and which barriers lie between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace emulated {

constexpr int WARP = 32, MOST_THREADS = 1024;
constexpr size_t MOST_SHARED = 48 << 10;

class Memory {
 public:
  void begin_launch();
  void begin_block();
  void pass_barrier() { last_barrier_ = ++tick_; }
  void pass_warp_barrier(int warp) { warp_barriers_[warp] = ++tick_; }

  // Makes a variable memory that the block shares, filled with NaN, unless another thread has done so. Returns whether
  // there is room for it.
  bool share(void* variable, size_t bytes);
  bool is_shared(uintptr_t address) const;

  // Notes that a thread reads or writes. Returns what is wrong with that, or null.
  const char* access(uintptr_t address, size_t bytes, bool write, int thread);

 private:
  // Ticks are times: each barrier and each block takes one. A reader may be one of the marks of memory.cpp.
  struct Byte {
    uint32_t written = 0, read = 0;
    uint16_t writer = 0, reader = 0;
  };
  static constexpr uintptr_t PAGE = 4096, RECENT = 1024;
  struct Page {
    Byte bytes[PAGE];
  };
  struct Found {
    uintptr_t number = ~uintptr_t{0};
    Page* page = nullptr;
  };
  struct Shared {
    char* begin;
    size_t bytes;
  };

  Byte& byte_at(uintptr_t address);
  bool after_warp_barrier(uint32_t then, int warp, int thread) const;
  bool races_with_write(const Byte& byte, int thread, bool in_shared) const;
  bool races_with_reads(const Byte& byte, int thread, bool in_shared) const;
  void note_read(Byte& byte, int thread, bool in_shared) const;

  uint32_t tick_ = 0, launch_began_ = 0, block_began_ = 0, last_barrier_ = 0, warp_barriers_[MOST_THREADS / WARP] = {};
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Found recent_[RECENT];
  std::vector<Shared> shared_;  // of the block that runs
};

}  // namespace emulated

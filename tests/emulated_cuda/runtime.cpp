// A CUDA device on one CPU thread. Blocks run one after another; each CUDA thread is a fiber that runs to its next barrier
// or shuffle. Kernels are compiled with -fsanitize=thread,undefined, and what the compiler then calls at every access to
// memory, and at undefined behaviour, is defined here instead of by the sanitizers' libraries: it finds races of threads
// and blocks, reads of shared memory that nobody wrote, and, where libasan is loaded, accesses outside of any tensor.
//
// What it finds ends the launch with an exception that names kernel, block, thread and line.
#include "cuda_runtime.h"
#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

extern "C" void* __asan_region_is_poisoned(void* begin, size_t bytes) __attribute__((weak));

namespace emulated {

Indices here;

namespace {

constexpr size_t STACK = 64 << 10;

// forward: threads one after another, each to its next stop, and blocks too. warps: both from the last, and each warp goes
// on through its shuffles until it stands at a barrier.
enum Order { forward, warps };

std::vector<Kernel*>& kernels() {
  static std::vector<Kernel*> known;
  return known;
}

cudaError_t last_error = cudaSuccess;
char stream;  // its address is torch's current stream
Order order;

// Fibers.

enum State { ready, at_barrier, at_shuffle, gone };
using Jump = void*[5];

struct Fiber {
  bool begun = false;
  Jump resume;
  ucontext_t start;
  State state = gone;
  const char* line = "";  // where it waits
  // Of a shuffle; of a barrier of its warp `from` is the own lane.
  unsigned mask = 0;
  uint64_t value = 0;
  int from = 0;
  bool warp_barrier = false;
};

Fiber fibers[MOST_THREADS];
char* stacks;  // of all fibers, one after another
Jump scheduler;
Fiber* running = nullptr;
const Kernel* running_kernel;
const std::function<void()>* thread_function;
std::string failure;

int number_of(const Fiber* fiber) { return static_cast<int>(fiber - fibers); }

// noipa: a __builtin_longjmp must not stand in the function that it jumps into, and callers of these three must not rely
// on registers that another fiber will have changed.
[[gnu::noipa]] void jump_to(Jump to) { __builtin_longjmp(to, 1); }

void run_threads() {
  for (;;) {
    (*thread_function)();
    running->state = gone;
    if (__builtin_setjmp(running->resume) == 0) jump_to(scheduler);
  }
}

[[gnu::noipa]] void resume(Fiber& fiber) {
  running = &fiber;
  const unsigned i = static_cast<unsigned>(number_of(&fiber));
  here.thread = {
      i % here.block_size.x, i / here.block_size.x % here.block_size.y, i / here.block_size.x / here.block_size.y};
  if (__builtin_setjmp(scheduler) == 0) {
    if (fiber.begun) jump_to(fiber.resume);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + i * STACK;
    fiber.start.uc_stack.ss_size = STACK;
    makecontext(&fiber.start, run_threads, 0);
    setcontext(&fiber.start);
  }
  running = nullptr;
}

[[gnu::noipa]] void wait(State state, const char* line) {
  running->state = state;
  running->line = line;
  if (__builtin_setjmp(running->resume) == 0) jump_to(scheduler);
}

// Lines of code, found by binutils where there is a failure to tell.

std::string lines_of(void* return_address) {
  Dl_info library;
  char* at = static_cast<char*>(return_address) - 1;
  if (!dladdr(at, &library)) return "?";
  char command[4096];
  std::snprintf(
      command, sizeof(command), "LD_PRELOAD= addr2line -i -e '%s' 0x%zx 2>/dev/null", library.dli_fname,
      static_cast<size_t>(at - static_cast<char*>(library.dli_fbase)));
  std::string found;
  FILE* output = popen(command, "r");
  char line[1024];
  while (output && std::fgets(line, sizeof(line), output)) {
    std::string text(line);
    text = text.substr(0, text.find_first_of(" \n"));
    text = text.substr(text.rfind('/') + 1);
    if (text.rfind("cuda_runtime.h", 0) == 0) break;
    found += (found.empty() ? "" : " of ") + text;
  }
  if (output) pclose(output);
  return found.empty() ? "?" : found;
}

std::string short_name(const Kernel& kernel) {
  // constexpr const char* emulated::signature() [with auto function = megalite::cuda::{anonymous}::norm<float, 4>]
  std::string name(kernel.signature);
  const size_t begin = name.find("function = ") + 11;
  name = name.substr(begin, name.rfind(']') - begin);
  const size_t arguments = name.find('<'), room = name.rfind("::", arguments);
  return room == std::string::npos ? name : name.substr(room + 2);
}

// Ends the launch. On a fiber: for good.
void fail(const std::string& what) {
  std::string found = "emulated CUDA: ";
  if (running_kernel) found += short_name(*running_kernel) + ", block " + std::to_string(here.block.x);
  if (running) found += ", thread " + std::to_string(number_of(running));
  found += ": " + what;
  if (!running) throw std::runtime_error(found);
  failure = found;
  jump_to(scheduler);
}

Memory memory;
alignas(16) char dynamic[MOST_SHARED];
size_t dynamic_bytes;

void access(void* pointer, size_t bytes, bool write, void* caller) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!running || address - reinterpret_cast<uintptr_t>(stacks) < STACK * MOST_THREADS ||
      address - reinterpret_cast<uintptr_t>(&here) < sizeof(here))
    return;
  const std::string verb = write ? "writes " : "reads ";
  if (__asan_region_is_poisoned && __asan_region_is_poisoned(pointer, bytes))
    fail(verb + std::to_string(bytes) + " bytes outside of any tensor, at " + lines_of(caller));
  if (address - reinterpret_cast<uintptr_t>(dynamic) < MOST_SHARED && !memory.is_shared(address))
    fail(verb + std::to_string(bytes) + " bytes outside of the block's shared memory, at " + lines_of(caller));
  if (const char* fault = memory.access(address, bytes, write, number_of(running)))
    fail(verb + fault + ", at " + lines_of(caller));
}

// Blocks.

// Lets lanes of a warp through a shuffle, or a barrier of the warp, that all lanes of its mask have reached.
bool release(int first, int count, int leader) {
  Fiber* warp = fibers + first;
  const unsigned mask = warp[leader].mask;
  const char* line = warp[leader].line;
  uint64_t values[WARP];
  for (int i = 0; i < WARP; ++i) {
    if (!(mask >> i & 1)) continue;
    if (i >= count || warp[i].state == gone)
      fail(std::string(line) + " waits for lane " + std::to_string(i) + " of a warp, which is gone");
    if (warp[i].state != at_shuffle) return false;
    if (warp[i].line != line || warp[i].mask != mask)
      fail("lanes of a warp are at " + std::string(line) + " and at " + warp[i].line + ", or with different masks");
    values[i] = warp[i].value;
  }
  if (!(mask >> leader & 1)) fail("a lane is not in the mask of its own shuffle at " + std::string(line));
  for (int i = 0; i < count; ++i) {
    if (!(mask >> i & 1)) continue;
    const int from = warp[i].from;
    if (from < 0 || from >= WARP || !(mask >> from & 1))
      fail(std::string(line) + " reads lane " + std::to_string(from) + ", which is not in its mask");
    warp[i].value = values[from];
    warp[i].state = ready;
  }
  if (warp[leader].warp_barrier) memory.pass_warp_barrier(first / WARP);
  return true;
}

bool release_warp(int first, int threads) {
  bool any = false;
  const int count = std::min(WARP, threads - first);
  for (int i = 0; i < count; ++i)
    if (fibers[first + i].state == at_shuffle) any |= release(first, count, i);
  return any;
}

// Runs threads [first, first + count) that can run, each to its next stop.
bool run_ready(int first, int count) {
  bool any = false;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[order == forward ? first + i : first + count - 1 - i];
    if (fiber.state != ready) continue;
    resume(fiber);
    if (!failure.empty()) throw std::runtime_error(failure);
    any = true;
  }
  return any;
}

bool run_to_stops(int threads) {
  if (order != warps) {
    bool any = run_ready(0, threads);
    for (int first = 0; first < threads; first += WARP) any |= release_warp(first, threads);
    return any;
  }
  bool any = false;
  for (int first = (threads - 1) / WARP * WARP; first >= 0; first -= WARP) {
    const int count = std::min(WARP, threads - first);
    for (bool again = true; again; any |= again) again = run_ready(first, count) | release_warp(first, threads);
  }
  return any;
}

// Whether the block has ended. Lets its threads through a barrier that all have reached.
bool ended(int threads, bool moved) {
  int left = 0, waiting = 0;
  const char *line = nullptr, *other = nullptr;
  for (int i = 0; i < threads; ++i) {
    left += fibers[i].state != gone;
    if (fibers[i].state != at_barrier) continue;
    ++waiting;
    if (!line) line = fibers[i].line;
    if (fibers[i].line != line) other = fibers[i].line;
  }
  if (left == 0) return true;
  if (waiting < left) {
    if (!moved) fail(std::to_string(waiting) + " of its threads wait at a barrier, others elsewhere, for ever");
    return false;
  }
  if (left < threads)
    fail("the barrier at " + std::string(line) + " lacks " + std::to_string(threads - left) + " threads that have ended");
  if (other) fail("threads are at the barriers of " + std::string(line) + " and of " + other);
  for (int i = 0; i < threads; ++i) fibers[i].state = ready;
  memory.pass_barrier();
  return false;
}

void run_block(int threads) {
  memory.begin_block();
  for (int i = 0; i < threads; ++i) fibers[i].state = ready;
  while (!ended(threads, run_to_stops(threads))) {
  }
}

void prepare() {
  if (stacks) return;
  void* memory = mmap(
      nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulated CUDA: no memory for stacks");
  stacks = static_cast<char*>(memory);
}

// That of EMULATED_CUDA_ORDER; else the two in turn, by the kernel's own count, so that no kernel sees one of them only.
Order order_of_launch(const Kernel& kernel) {
  static const char* asked = std::getenv("EMULATED_CUDA_ORDER");
  return static_cast<Order>(asked ? std::atoi(asked) : kernel.launches % 2);
}

bool fits(const Extent& grid, const Extent& block, size_t shared_bytes) {
  const auto within = [](int64_t x, int64_t most) { return x >= 1 && x <= most; };
  return within(grid.x, 2147483647) && within(grid.y, 65535) && within(grid.z, 65535) && within(block.x, 1024) &&
         within(block.y, 1024) && within(block.z, 64) && block.x * block.y * block.z <= MOST_THREADS &&
         shared_bytes <= MOST_SHARED;
}

}  // namespace

Kernel::Kernel(const char* signature) : signature(signature) { kernels().push_back(this); }

void run(
    Kernel& kernel, Extent grid, Extent block, size_t shared_bytes, cudaStream_t on,
    const std::function<void()>& thread) {
  prepare();
  running_kernel = &kernel;
  here = {};
  if (on != &stream) fail("it is launched on another stream than torch's current one");
  if (!fits(grid, block, shared_bytes)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  order = order_of_launch(kernel);
  ++kernel.launches;
  const auto sizes = [](const Extent& x) {
    return dim3(static_cast<unsigned>(x.x), static_cast<unsigned>(x.y), static_cast<unsigned>(x.z));
  };
  here.block_size = sizes(block);
  here.grid_size = sizes(grid);
  thread_function = &thread;
  dynamic_bytes = shared_bytes;
  memory.begin_launch();
  const int64_t blocks = grid.x * grid.y * grid.z;
  try {
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t at = order == forward ? i : blocks - 1 - i;
      here.block = {
          static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
          static_cast<unsigned>(at / grid.x / grid.y)};
      run_block(static_cast<int>(block.x * block.y * block.z));
    }
  } catch (...) {
    for (Fiber& fiber : fibers) fiber.begun = false;  // some stand in the middle of the kernel
    failure.clear();
    throw;
  }
}

void share(void* variable, size_t bytes) {
  if (!memory.share(variable, bytes)) fail("more than 48 KB of shared memory");
}

void* dynamic_shared() {
  share(dynamic, dynamic_bytes);
  return dynamic;
}

void check_launch_bounds(int most_threads) {
  const auto& size = here.block_size;
  if (static_cast<int>(size.x * size.y * size.z) > most_threads)
    fail("the block is larger than the kernel's __launch_bounds__, " + std::to_string(most_threads));
}

int lane() { return number_of(running) % WARP; }

void sync_threads(const char* line) { wait(at_barrier, line); }

uint64_t shuffle(unsigned mask, uint64_t value, int from, const char* line) {
  Fiber* self = running;
  self->mask = mask;
  self->value = value;
  self->from = from;
  self->warp_barrier = false;
  wait(at_shuffle, line);
  return self->value;
}

void sync_warp(unsigned mask, const char* line) {
  running->mask = mask;
  running->from = lane();
  running->warp_barrier = true;
  wait(at_shuffle, line);
}

}  // namespace emulated

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulated::last_error;
  emulated::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid configuration argument" : "no error"; }

// What else the wrappers ask of CUDA.
extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = &emulated::stream;
  return 0;
}

// Lines "LAUNCHES NAME" of the kernels, for the tests.
extern "C" __attribute__((visibility("default"))) const char* emulated_cuda_launches() {
  static std::string lines;
  lines.clear();
  for (const emulated::Kernel* kernel : emulated::kernels())
    lines += std::to_string(kernel->launches) + " " + emulated::short_name(*kernel) + "\n";
  return lines.c_str();
}

// What -fsanitize=thread calls.
#define EMULATED_ACCESS(size) \
  void __tsan_read##size(void* at) { emulated::access(at, size, false, __builtin_return_address(0)); } \
  void __tsan_write##size(void* at) { emulated::access(at, size, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##size(void* at) { emulated::access(at, size, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##size(void* at) { emulated::access(at, size, true, __builtin_return_address(0)); }
extern "C" {
EMULATED_ACCESS(1)
EMULATED_ACCESS(2)
EMULATED_ACCESS(4)
EMULATED_ACCESS(8)
EMULATED_ACCESS(16)
void __tsan_read_range(void* at, size_t size) { emulated::access(at, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t size) { emulated::access(at, size, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
}

// What -fsanitize=undefined calls. All that it gives begins with the place in the source.
struct Place {
  const char* file;
  uint32_t line, column;
};
static void undefined(const char* what, const Place* place) {
  const std::string file(place->file);
  emulated::fail(
      std::string(what) + ", at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(place->line));
}
#define EMULATED_UNDEFINED(handler, what) \
  void __ubsan_handle_##handler(Place* place) { undefined(what, place); }
extern "C" {
EMULATED_UNDEFINED(type_mismatch_v1, "a null or misaligned address")
EMULATED_UNDEFINED(out_of_bounds, "an index outside of an array")
EMULATED_UNDEFINED(shift_out_of_bounds, "a shift by too many bits")
EMULATED_UNDEFINED(add_overflow, "a sum that overflows")
EMULATED_UNDEFINED(sub_overflow, "a difference that overflows")
EMULATED_UNDEFINED(mul_overflow, "a product that overflows")
EMULATED_UNDEFINED(negate_overflow, "a negation that overflows")
EMULATED_UNDEFINED(divrem_overflow, "a division by zero")
EMULATED_UNDEFINED(pointer_overflow, "an address that overflows")
EMULATED_UNDEFINED(load_invalid_value, "a value that its type does not have")
EMULATED_UNDEFINED(nonnull_arg, "a null argument")
EMULATED_UNDEFINED(missing_return, "a function that ends without a result")
EMULATED_UNDEFINED(builtin_unreachable, "a line that cannot be reached")
EMULATED_UNDEFINED(vla_bound_not_positive, "an array without elements")
EMULATED_UNDEFINED(float_cast_overflow, "a number that its integer type does not hold")
}

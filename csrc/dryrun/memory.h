// The memory of a GPU that is not there: addresses without memory behind them, every allocation counted.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <cstdint>
#include <map>

namespace megalite::dryrun {

// As CUDA's caching allocator rounds.
constexpr size_t kRounding = 512;

// What asks Python where it is: `kind` is the operation at work, or why the host waits. Returns the number of that place.
using WhereAmI = int64_t (*)(const char* kind);
void set_where(WhereAmI where);
int64_t where(const char* kind);

// The operation that this thread is computing, for allocations made in it.
const char*& current_operation();

c10::Allocator* allocator();
c10::Allocator* pinned_allocator();
bool is_pinned(const void* data);

struct Usage {
  int64_t now, peak, pinned_peak;
};
Usage usage();
// Begins a phase: the peak is that of what happens from now on.
void reset_peak();
// The place of the allocation that made the peak of the phase; -1: it was there at the begin.
int64_t peak_place();
// Bytes at the peak of the phase, by the place that allocated them.
std::map<int64_t, int64_t> at_peak();

// What a device tensor is known to hold: small tensors that were copied from the host whole, and counts that the router
// of a mixture of experts would give in balance. Everything else reads as zeros.
void know(const at::Tensor& tensor, const at::Tensor& content);
const at::Tensor* known(const at::Tensor& tensor);

}  // namespace megalite::dryrun

// The functions that -fsanitize=thread makes kernels call before every access to memory. libtsan is not linked: these
// are they. A report leaves the fiber for good, since the compiler takes the hooks for functions that do not throw.
#if defined(SIMT_CHECKED)
#include "check_access.h"
#include "check_places.h"

namespace simt::model::check {

namespace {

// A thread that reads the same few bytes again and again waits for another, which must be let run.
struct Spin {
  const char *lowest = nullptr, *highest = nullptr;
  unsigned reads = 0;
  const Thread* thread = nullptr;
} spin;
constexpr unsigned spin_after = 20000, spin_again_after = 256;
constexpr size_t spin_bytes = 64;

void watch_for_spin(const char* pointer, bool write, Thread& thread, uint16_t place) {
  const char *lowest = std::min(spin.lowest, pointer), *highest = std::max(spin.highest, pointer);
  if (write || spin.thread != &thread || size_t(highest - lowest) > spin_bytes) {
    spin = {pointer, pointer, 0, &thread};
    return;
  }
  spin.lowest = lowest;
  spin.highest = highest;
  if (++spin.reads < spin_after) return;
  const Spin mine = spin;
  thread.polls = ~0u - 1;  // at once
  poll(read_line(place));
  spin = mine;
  spin.reads = spin_after - spin_again_after;
}

__attribute__((noinline)) void check_access(const void* pointer, size_t bytes, bool write, bool is_volatile,
                                            bool aligned, const void* pc) {
  Thread& thread = *self();
  std::string error;
  try {
    Inside inside;
    const uint16_t place = place_of(pc);
    if (aligned && reinterpret_cast<uintptr_t>(pointer) % bytes)
      fail(std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at " + where(pointer) +
               ", which is not a multiple of them: a GPU refuses it",
           read_line(place));
    watch_for_spin(static_cast<const char*>(pointer), write, thread, place);  // before: others may write what is read
    check_generic(pointer, bytes, write, is_volatile, thread, place);
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  if (!error.empty()) abandon(*worker, *thread.fiber, std::move(error));
}

__attribute__((noinline)) void check_own_stack(const void* pointer, size_t bytes, bool write, const void* pc) {
  Thread& thread = *self();
  std::string error;
  try {
    Inside inside;
    check_registers(pointer, bytes, write, thread, place_of(pc));
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  if (!error.empty()) abandon(*worker, *thread.fiber, std::move(error));
}

inline void hook(const void* pointer, size_t bytes, bool write, bool is_volatile, bool aligned, const void* pc) {
  const Thread* thread = self();
  if (!thread || !bytes || is_models_own(pointer)) return;
  if (pointer >= thread && pointer < thread + 1) return;  // threadIdx and its like
  if (thread->fiber->holds(pointer)) {
    if (any_watched(*thread)) check_own_stack(pointer, bytes, write, pc);
    return;
  }
  check_access(pointer, bytes, write, is_volatile, aligned, pc);
}

}  // namespace

}  // namespace simt::model::check

using simt::model::check::hook;

extern "C" {
#define CALLER __builtin_return_address(0)
#define HOOK(BYTES)                                                                            \
  void __tsan_read##BYTES(void* p) { hook(p, BYTES, false, false, true, CALLER); }                   \
  void __tsan_write##BYTES(void* p) { hook(p, BYTES, true, false, true, CALLER); }                   \
  void __tsan_unaligned_read##BYTES(void* p) { hook(p, BYTES, false, false, false, CALLER); }         \
  void __tsan_unaligned_write##BYTES(void* p) { hook(p, BYTES, true, false, false, CALLER); }         \
  void __tsan_volatile_read##BYTES(void* p) { hook(p, BYTES, false, true, true, CALLER); }           \
  void __tsan_volatile_write##BYTES(void* p) { hook(p, BYTES, true, true, true, CALLER); }           \
  void __tsan_unaligned_volatile_read##BYTES(void* p) { hook(p, BYTES, false, true, false, CALLER); } \
  void __tsan_unaligned_volatile_write##BYTES(void* p) { hook(p, BYTES, true, true, false, CALLER); } \
  void __tsan_read_write##BYTES(void* p) { hook(p, BYTES, true, false, true, CALLER); }
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
#undef HOOK
void __tsan_read_range(void* p, long bytes) { hook(p, size_t(bytes), false, false, false, CALLER); }
void __tsan_write_range(void* p, long bytes) { hook(p, size_t(bytes), true, false, false, CALLER); }
void __tsan_vptr_read(void** p) { hook(p, sizeof *p, false, false, true, CALLER); }
void __tsan_vptr_update(void** p, void*) { hook(p, sizeof *p, true, false, true, CALLER); }
#undef CALLER
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#endif

// A fiber: a stack of its own and the means to go on with another. CUDA threads are fibers of one OS thread.
#pragma once
#include <cstddef>

#if !defined(SIMT_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define SIMT_UCONTEXT  // any other processor: slower by two system calls a switch
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt::model {

class Fiber {
 public:
  static constexpr size_t stack_bytes = 256 * 1024, guard_bytes = 64 * 1024;

  Fiber() = default;  // the OS thread's own stack
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void rewind();  // forget what was running: the next switch starts at the entry
  bool holds(const void* address) const {
    return base_ && address >= base_ && address < base_ + stack_bytes;
  }
  static void switch_to(Fiber& from, Fiber& to);

 private:
  void (*entry_)() = nullptr;
  char* base_ = nullptr;  // lowest usable byte; the 64 KiB of the guard lie below
  void* stack_pointer_ = nullptr;
#if defined(SIMT_UCONTEXT)
  ucontext_t context_;
#endif
};

}  // namespace simt::model

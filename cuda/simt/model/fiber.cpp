// Switching fibers: callee-saved registers onto one stack, the other's off its own. x86-64 and aarch64 by hand (System V
// and AAPCS64 calling conventions), ucontext elsewhere.
#include "fiber.h"

#include <sys/mman.h>

#include <new>

namespace simt::model {

#if !defined(SIMT_UCONTEXT)
extern "C" void simt_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));

#if defined(__x86_64__)
constexpr int saved_words = 7;  // r15 r14 r13 r12 rbx rbp and the return address
constexpr int entry_word = 6;
asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
)");
#else
constexpr int saved_words = 20;  // x19-x30, d8-d15
constexpr int entry_word = 11;   // x30, the link register
asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack, %function
simt_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch_stack, .-simt_switch_stack
)");
#endif
#endif

Fiber::Fiber(void (*entry)()) : entry_(entry) {
  void* memory = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // A stack that overflows faults instead of writing into its neighbour.
  if (mprotect(memory, guard_bytes, PROT_NONE)) {  // too many mappings: vm.max_map_count
    munmap(memory, stack_bytes + guard_bytes);
    throw std::bad_alloc();
  }
  base_ = static_cast<char*>(memory) + guard_bytes;
  rewind();
}

Fiber::~Fiber() {
  if (base_) munmap(base_ - guard_bytes, stack_bytes + guard_bytes);
}

void Fiber::rewind() {
#if defined(SIMT_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = base_;
  context_.uc_stack.ss_size = stack_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry_, 0);
#else
  void** top = reinterpret_cast<void**>(base_ + stack_bytes) - 2;
  // On x86-64 a function is entered with the stack 8 bytes below a multiple of 16, where `call` leaves it.
  void** frame = top - saved_words - (saved_words % 2 ? 1 : 0);
  for (void** word = frame; word < top; ++word) *word = nullptr;
  frame[entry_word] = reinterpret_cast<void*>(entry_);
  stack_pointer_ = frame;
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
#if defined(SIMT_UCONTEXT)
  swapcontext(&from.context_, &to.context_);
#else
  simt_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#endif
}

}  // namespace simt::model

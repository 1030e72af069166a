// What the compiler makes of __atomic_* and std::atomic under -fsanitize=thread. Host code beside the kernels may use
// them (guards of static variables, reference counts); a kernel that does gets an error: CUDA has other words for it.
#if defined(SIMT_CHECKED)
#include <cstdint>

#include "check_places.h"
#include "state.h"

namespace {

void refuse_in_kernels(const void* pc) {
  using namespace simt::model;
  Thread* thread = self();
  if (!thread || thread->inside) return;
  const std::string line = check::line_text(check::place_of(pc));
  abandon(*worker, *thread->fiber,
          "a C++ atomic in a kernel: use atomicAdd and its like, or ptx::load_acquire and ptx::store_release\n  by " +
              describe(*thread) + " at " + line);
}

}  // namespace

#define ENTER refuse_in_kernels(__builtin_return_address(0))
extern "C" {
#define ATOMIC_UPDATE(BITS, NAME)                                                       \
  uint##BITS##_t __tsan_atomic##BITS##_##NAME(uint##BITS##_t* p, uint##BITS##_t value, int) { \
    ENTER;                                                                              \
    return __atomic_##NAME(p, value, __ATOMIC_SEQ_CST);                                 \
  }
#define ATOMIC(BITS)                                                                    \
  uint##BITS##_t __tsan_atomic##BITS##_load(const uint##BITS##_t* p, int) {             \
    ENTER;                                                                              \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                        \
  }                                                                                     \
  void __tsan_atomic##BITS##_store(uint##BITS##_t* p, uint##BITS##_t value, int) {      \
    ENTER;                                                                              \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                       \
  }                                                                                     \
  uint##BITS##_t __tsan_atomic##BITS##_exchange(uint##BITS##_t* p, uint##BITS##_t value, int) { \
    ENTER;                                                                              \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                             \
  }                                                                                     \
  ATOMIC_UPDATE(BITS, fetch_add)                                                        \
  ATOMIC_UPDATE(BITS, fetch_sub)                                                        \
  ATOMIC_UPDATE(BITS, fetch_and)                                                        \
  ATOMIC_UPDATE(BITS, fetch_or)                                                         \
  ATOMIC_UPDATE(BITS, fetch_xor)                                                        \
  ATOMIC_UPDATE(BITS, fetch_nand)                                                       \
  int __tsan_atomic##BITS##_compare_exchange_strong(uint##BITS##_t* p, uint##BITS##_t* expected, \
                                                    uint##BITS##_t desired, int, int) { \
    ENTER;                                                                              \
    return __atomic_compare_exchange_n(p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                     \
  int __tsan_atomic##BITS##_compare_exchange_weak(uint##BITS##_t* p, uint##BITS##_t* expected, \
                                                  uint##BITS##_t desired, int, int) {   \
    ENTER;                                                                              \
    return __atomic_compare_exchange_n(p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                     \
  uint##BITS##_t __tsan_atomic##BITS##_compare_exchange_val(uint##BITS##_t* p, uint##BITS##_t expected, \
                                                            uint##BITS##_t desired, int, int) { \
    ENTER;                                                                              \
    __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    return expected;                                                                    \
  }
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)
#undef ATOMIC
#undef ATOMIC_UPDATE
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
}
#undef ENTER
#endif

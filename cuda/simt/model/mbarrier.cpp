// mbarrier in its 64 bits: 20 of pending arrivals, 20 of expected ones, 21 of signed transaction count, the phase, and a
// tag by which memory that was never initialised, or was overwritten, is recognised. A phase completes when both counts
// are zero; transactions may land before they are announced, so the count can be negative for a while.
#include "state.h"
#include "trace.h"

namespace simt::model {

namespace {

constexpr int64_t largest_count = (1 << 20) - 1;
constexpr unsigned initialised = 2;  // the tag; memory that nobody wrote (0xff..) or cleared has another

struct Fields {
  int64_t pending, expected, transactions;
  unsigned phase, tag;
};

Fields unpack(uint64_t word) {
  return {int64_t(word & 0xfffff), int64_t(word >> 20 & 0xfffff), int64_t(word << 3) >> 43, unsigned(word >> 61 & 1),
          unsigned(word >> 62)};
}

uint64_t pack(const Fields& f) {
  return uint64_t(f.pending) | uint64_t(f.expected) << 20 | (uint64_t(f.transactions) & 0x1fffff) << 40 |
         uint64_t(f.phase) << 61 | uint64_t(initialised) << 62;
}

Fields read(const uint64_t* barrier, Site site) {
  mbarrier_check(barrier, site);
  return unpack(*barrier);
}

std::string name(const uint64_t* barrier) { return "mbarrier " + where(barrier); }

// Writes the counts back; a completed phase lets its waiters go.
void update(uint64_t* barrier, Fields f) {
  ++worker->progress;
  if (f.pending || f.transactions) {
    *barrier = pack(f);
    return;
  }
  f.phase ^= 1;
  f.pending = f.expected;
  *barrier = pack(f);
  check::mbarrier_phase_done(barrier);
  auto& waiting = worker->gang.mbarrier_waiting;
  for (size_t i = 0; i < waiting.size();) {
    if (waiting[i]->object == barrier && waiting[i]->detail != f.phase) {
      wake(waiting[i]);
      waiting.erase(waiting.begin() + long(i));
    } else {
      ++i;
    }
  }
}

std::string transaction_overflow(const uint64_t* barrier) {
  return name(barrier) + ": the transaction count leaves its range of +-" + std::to_string(largest_count) + " bytes";
}

void arrive(uint64_t* barrier, uint32_t bytes, Site site) {
  Fields f = read(barrier, site);
  f.transactions += bytes;
  --f.pending;
  if (f.pending < 0)
    fail(name(barrier) + ": more arrivals than the " + std::to_string(f.expected) + " expected in phase " +
             std::to_string(f.phase),
         site);
  if (f.transactions > largest_count) fail(transaction_overflow(barrier), site);
  update(barrier, f);
}

void check_parity(uint32_t parity, Site site) {
  if (parity > 1) fail("mbarrier.try_wait for parity " + std::to_string(parity) + ", expected 0 or 1", site);
}

void own(const uint64_t* barrier, const char* what, Site site) {
  if (owner(barrier) != self()->cta) fail(std::string(what) + " on " + name(barrier) + ", which is not this block's", site);
}

}  // namespace

void mbarrier_check(const uint64_t* barrier, Site site) {
  if (!owner(barrier)) fail(name(barrier) + " is not in dynamic shared memory", site);
  if (reinterpret_cast<uintptr_t>(barrier) % 8) fail(name(barrier) + " is not 8-byte aligned", site);
  const Fields f = unpack(*barrier);
  if (f.tag != initialised || !f.expected) fail(name(barrier) + " is used before mbarrier.init, or was overwritten", site);
}

std::string mbarrier_text(const uint64_t* barrier) {
  const Fields f = unpack(*barrier);
  if (f.tag != initialised) return "not initialised";
  return "phase " + std::to_string(f.phase) + ", pending arrivals " + std::to_string(f.pending) + " of " +
         std::to_string(f.expected) + ", tx-count " + std::to_string(f.transactions);
}

void mbarrier_init(uint64_t* barrier, uint32_t count, Site site) {
  Inside inside;
  own(barrier, "mbarrier.init", site);
  if (reinterpret_cast<uintptr_t>(barrier) % 8) fail(name(barrier) + " is not 8-byte aligned", site);
  if (!count || count > largest_count)
    fail("mbarrier.init with a count of " + std::to_string(count) + ", expected 1 to " + std::to_string(largest_count), site);
  for (Thread* thread : worker->gang.mbarrier_waiting)
    if (thread->object == barrier) fail("mbarrier.init of " + name(barrier) + " while " + describe(*thread) + " waits on it", site);
  *barrier = pack({count, count, 0, 0, initialised});
  check::mbarrier_init(barrier, *self(), site);
  trace("mbarrier init", offset_of(barrier), count, site);
}

void mbarrier_inval(uint64_t* barrier, Site site) {
  Inside inside;
  own(barrier, "mbarrier.inval", site);
  mbarrier_check(barrier, site);
  *barrier = ~0ull;
}

void mbarrier_expect_transaction(uint64_t* barrier, uint32_t bytes, Site site) {
  Inside inside;
  own(barrier, "mbarrier.expect_tx", site);
  Fields f = read(barrier, site);
  check::mbarrier_use(barrier, *self(), site);
  f.transactions += bytes;
  if (f.transactions > largest_count) fail(transaction_overflow(barrier), site);
  trace("mbarrier expect", offset_of(barrier), bytes, site);
  update(barrier, f);
}

void mbarrier_arrive(uint64_t* barrier, uint32_t transaction_bytes, Site site) {
  Inside inside;
  own(barrier, "mbarrier.arrive", site);
  mbarrier_check(barrier, site);
  check::mbarrier_arrive(barrier, *self(), site);
  trace("mbarrier arrive", offset_of(barrier), transaction_bytes, site);
  arrive(barrier, transaction_bytes, site);
}

void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank, Site site) {
  Inside inside;
  own(barrier, "mapa", site);
  auto* remote = static_cast<uint64_t*>(map_rank(static_cast<void*>(barrier), rank, site));
  if (remote != barrier && !self()->cta->cluster->phase)
    fail("remote arrive on " + name(remote) + ": the block " + not_started_text, site);
  mbarrier_check(remote, site);
  check::mbarrier_arrive(remote, *self(), site);
  arrive(remote, 0, site);
}

bool mbarrier_test(uint64_t* barrier, uint32_t parity, Site site) {
  poll(site);
  Inside inside;
  own(barrier, "mbarrier.try_wait", site);
  check_parity(parity, site);
  if (read(barrier, site).phase == parity) return false;
  check::mbarrier_acquire(barrier, *self(), site);
  return true;
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site) {
  Inside inside;
  own(barrier, "mbarrier.try_wait", site);
  check_parity(parity, site);
  check::count(check::Count::mbarrier_waits, 1, site);
  trace("mbarrier wait", offset_of(barrier), parity, site);
  if (read(barrier, site).phase == parity) {
    worker->gang.mbarrier_waiting.push_back(self());
    block_on(Waits::mbarrier, barrier, parity, site);
  }
  check::mbarrier_acquire(barrier, *self(), site);
}

void mbarrier_complete_transaction(uint64_t* barrier, uint32_t bytes, const check::Snapshot& by, Site issued) {
  const Cta& block = *owner(barrier);
  Fields f = unpack(*barrier);
  if (f.tag != initialised || !f.expected)
    fail_issued(name(barrier) + " is not initialised, or was overwritten, when a copy's bytes land", issued, block);
  f.transactions -= bytes;
  if (f.transactions < -largest_count) fail_issued(transaction_overflow(barrier), issued, block);
  check::mbarrier_arrive(barrier, by, issued);
  update(barrier, f);
}

void mbarrier_arrive_by(uint64_t* barrier, const check::Snapshot& by, Site issued) {
  Fields f = unpack(*barrier);
  if (--f.pending < 0) fail_issued(name(barrier) + ": more arrivals than expected in this phase", issued, *owner(barrier));
  check::mbarrier_arrive(barrier, by, issued);
  update(barrier, f);
}

// mbarrier.init becomes visible with the barrier that follows: threads switch only in the model, so nothing is delayed.
// The checked build asks for the fence where TMA counts on the barrier, or a relaxed cluster barrier follows.
void fence_mbarrier_init(Site) {
  Inside inside;
  check::fence_mbarrier_init(*self());
}

}  // namespace simt::model

// A kernel that spins without ever calling the model would hang the process: nobody else runs. One thread looks at the
// workers; where the scheduler has not moved for Options.timeout_s, it interrupts the kernel by a signal, whose handler
// leaves the fiber for good. It never interrupts inside the model, whose state must stay whole.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "state.h"

namespace simt::model {

namespace {

struct Watched {
  Worker* worker;
  pthread_t thread;
  uint64_t steps;
  std::chrono::steady_clock::time_point since;
};

auto& watched = *new std::vector<Watched>;  // under locks().watchdog
pid_t running_in = 0;                       // a forked child has no such thread
struct sigaction previous;                  // there may be several of these modules in a process, each with a handler

// Only leaves the fiber: run_threads finds the words.
void interrupt(int signal, siginfo_t* info, void* context) {
  Worker* w = worker;
  if (w && w->interrupt && current && !current->inside) {
    w->interrupt = false;
    Thread* thread = self();
    w->interrupted = thread;
    current = nullptr;
    Fiber::switch_to(*thread->fiber, w->main);
  }
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  }
}

void look() {
  for (;;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    std::lock_guard lock(locks().watchdog);
    const auto now = std::chrono::steady_clock::now();
    for (Watched& one : watched) {
      const uint64_t steps = __atomic_load_n(&one.worker->steps, __ATOMIC_RELAXED);
      if (steps != one.steps) {
        one.steps = steps;
        one.since = now;
      } else if (std::chrono::duration<double>(now - one.since).count() > one.worker->options.timeout_s) {
        one.worker->interrupt = true;
        pthread_kill(one.thread, SIGURG);
      }
    }
  }
}

void install_handler() {
  static bool installed = false;  // a forked child inherits it
  if (installed) return;
  installed = true;
  struct sigaction action = {};
  action.sa_sigaction = interrupt;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;  // the handler may not return
  sigaction(SIGURG, &action, &previous);
}

}  // namespace

Watch::Watch(Worker& w) : worker(w) {
  std::lock_guard lock(locks().watchdog);
  if (running_in != getpid()) {
    running_in = getpid();
    watched.clear();
    install_handler();
    std::thread(look).detach();
  }
  w.interrupt = false;
  watched.push_back({&w, pthread_self(), w.steps, std::chrono::steady_clock::now()});
}

Watch::~Watch() {
  std::lock_guard lock(locks().watchdog);
  for (size_t i = 0; i < watched.size(); ++i)
    if (watched[i].worker == &worker) watched.erase(watched.begin() + long(i));
  worker.interrupt = false;
}

}  // namespace simt::model

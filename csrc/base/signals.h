// Threads of ours inherit a mask that keeps all signals away from them.
#pragma once

#include <pthread.h>
#include <signal.h>

namespace lazyckpt {

// Python's signal handlers run on its main thread; ours must never be picked for delivery.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace lazyckpt

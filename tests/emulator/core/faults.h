// Reports processor faults in a kernel as findings: an unchecked access, or a stack overflow.
#pragma once

#include <signal.h>

namespace fastgen::emulator {

// While it lives, SIGSEGV and SIGBUS in a kernel end the launch with a finding. Other faults reach the previous
// handler.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

 private:
  static void handle(int signal, siginfo_t* info, void* context);

  stack_t old_stack_ = {};
  struct sigaction old_segv_ = {}, old_bus_ = {};
};

}  // namespace fastgen::emulator

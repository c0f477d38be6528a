// Registers of warps (PTX ISA, "setmaxnreg"): what one warp gives up, another may have.
#include "core/engine.h"

namespace fastgen::emulator {

namespace {

constexpr int kRegistersOfBlock = 65536, kMostOfThread = 255, kStep = 8, kWarpThreads = 32;

struct RegistersLane {
  int count;
  bool increase;
  Where where;
};

void run_set(Meeting& meeting) {
  Engine& engine = Engine::get();
  const auto& lane = *static_cast<const RegistersLane*>(meeting.lanes[0]);
  const int warp = engine.current_index / kWarpThreads;
  RegisterShare& share = engine.register_shares[warp];
  if (lane.increase ? lane.count < share.registers : lane.count > share.registers) {
    engine.fail(kind::kMisuse,
                std::string(lane.increase ? "increase" : "decrease") + "_registers: to " + std::to_string(lane.count) +
                    ", but the warp has " + std::to_string(share.registers),
                lane.where);
  }
  share.wanted = lane.count;
  engine.grant_registers();
}

constexpr WarpInstruction kSet = {"setmaxnreg", true, true, run_set};

}  // namespace

int launch_registers(int warps) {
  const int each = kRegistersOfBlock / (warps * kWarpThreads);
  return (each < kMostOfThread ? each : kMostOfThread) / kStep * kStep;
}

void Engine::grant_registers() {
  bool again = true;
  while (again) {
    again = false;
    for (int warp = 0; warp < warp_count; ++warp) {
      RegisterShare& share = register_shares[warp];
      const int more = (share.wanted - share.registers) * kWarpThreads;
      if (share.wanted == 0 || more > free_registers) continue;
      free_registers -= more;
      share.registers = share.wanted, share.wanted = 0;
      again = again || more < 0;
      for (int lane = 0; lane < kWarpThreads; ++lane) {
        const int thread = warp * kWarpThreads + lane;
        if (thread < thread_count && threads[thread]->state == Thread::kWaiting) wake(thread);
      }
    }
  }
}

void set_registers(int count, bool increase, Where where) {
  Engine& engine = Engine::get();
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  RegistersLane mine = {count, increase, where};
  engine.meet(kSet, static_cast<uint64_t>(count) * 2 + increase, engine.lanes_of(running->warp), &mine, where, site);
  while (engine.register_shares[running->warp].wanted != 0) {
    engine.wait({"setmaxnreg for " + std::to_string(count) + " registers", where, true, false, site});
  }
}

}  // namespace fastgen::emulator

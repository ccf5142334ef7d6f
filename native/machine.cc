#include "machine.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "peak.h"

#if defined(__x86_64__)
namespace jaxext {
namespace v2 { void peak_work(const PeakArgs&, const Parallel&); }
namespace v3 { void peak_work(const PeakArgs&, const Parallel&); }
namespace v4 { void peak_work(const PeakArgs&, const Parallel&); }
namespace v4bf16 { void peak_work(const PeakArgs&, const Parallel&); }
}  // namespace jaxext
#endif

namespace jaxext {
namespace {

struct Known {
  const char* name;
  bool compiled, supported;
};

std::vector<Known> known_isas() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512cd");
  bool bf16 = v4 && __builtin_cpu_supports("avx512bf16");
#else
  bool v2 = false, v3 = false, v4 = false, bf16 = false;
#endif
  return {{"v2", JAXEXT_COMPILED_V2, v2},
          {"v3", JAXEXT_COMPILED_V3, v3},
          {"v4", JAXEXT_COMPILED_V4, v4},
          {"v4bf16", JAXEXT_COMPILED_V4BF16, bf16}};
}

IsaChoice choose() {
  const char* request = std::getenv("JAXEXT_ISA");
  IsaChoice choice;
  bool named = !request || !*request;
  for (const Known& isa : known_isas()) {
    if (isa.compiled && isa.supported) choice.active = isa.name;
    if (request && !std::strcmp(request, isa.name)) {
      named = true;
      if (choice.active != isa.name)
        choice.problem = std::string("JAXEXT_ISA=") + request + " is not available: this " +
                         (isa.supported ? "build" : "CPU") +
                         " lacks it; unset it, or choose one of those that `jaxext doctor` lists";
      break;
    }
  }
  if (!named) {
    choice.problem = std::string("JAXEXT_ISA=") + request + " is unknown: expected v2, v3, v4 or v4bf16";
  } else if (choice.active.empty() && choice.problem.empty()) {
    choice.problem = "no compiled instruction set runs on this CPU (x86-64-v2 or newer is needed)";
  }
  if (!choice.problem.empty()) choice.active.clear();
  return choice;
}

}  // namespace

const IsaChoice& isa_choice() {
  static const IsaChoice choice = choose();
  return choice;
}

Isa active_isa() {
  static const Isa isa = [] {
    const std::string& name = isa_choice().active;
    return name == "v4bf16" ? Isa::v4bf16
           : name == "v4"   ? Isa::v4
           : name == "v3"   ? Isa::v3
           : name == "v2"   ? Isa::v2
                            : Isa::none;
  }();
  return isa;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Known& isa : known_isas())
    if (isa.compiled) names.push_back(isa.name);
  return names;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define JAXEXT_FEATURE(f) \
  if (__builtin_cpu_supports(f)) names.push_back(f);
  JAXEXT_FEATURE("sse4.2") JAXEXT_FEATURE("avx2") JAXEXT_FEATURE("fma") JAXEXT_FEATURE("avx512f")
  JAXEXT_FEATURE("avx512bw") JAXEXT_FEATURE("avx512vl") JAXEXT_FEATURE("avx512bf16")
#undef JAXEXT_FEATURE
#endif
  return names;
}

#if defined(__x86_64__)
namespace {

using Clock = std::chrono::steady_clock;

void work(PeakArgs& args) {
  Parallel alone{nullptr, 1, nullptr};
  const std::string& isa = isa_choice().active;
#if JAXEXT_COMPILED_V4BF16
  if (isa == "v4bf16") return v4bf16::peak_work(args, alone);
#endif
#if JAXEXT_COMPILED_V4
  if (isa == "v4") return v4::peak_work(args, alone);
#endif
#if JAXEXT_COMPILED_V3
  if (isa == "v3") return v3::peak_work(args, alone);
#endif
#if JAXEXT_COMPILED_V2
  if (isa == "v2") return v2::peak_work(args, alone);
#endif
}

// One thread's share: FLOPs or bytes done until the deadline.
double until(PeakKind kind, Clock::time_point deadline) {
  constexpr size_t kCopy = size_t{64} << 20;
  double done = 0;
  std::unique_ptr<char[]> from, to;
  PeakArgs args{kind, 200000, nullptr, nullptr, 0, &done};
  if (kind == PeakKind::copy) {
    from.reset(new char[kCopy]());
    to.reset(new char[kCopy]());
    args = {kind, 0, to.get(), from.get(), kCopy, &done};
  }
  work(args);
  done = 0;
  auto start = Clock::now();
  do work(args);
  while (Clock::now() < deadline);
  return done / std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace
#endif

double measure_peak(PeakKind kind, int threads, double seconds) {
#if defined(__x86_64__)
  if (isa_choice().active.empty()) return 0;
  threads = std::clamp(threads, 1, 1024);
  auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  std::vector<double> rate(threads);
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; i++) pool.emplace_back([&, i] { rate[i] = until(kind, deadline); });
  rate[0] = until(kind, deadline);
  for (auto& t : pool) t.join();
  double total = 0;
  for (double r : rate) total += r;
  return total;
#else
  return 0;
#endif
}

}  // namespace jaxext

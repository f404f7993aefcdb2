// The arithmetic that results are defined in: IEEE 754 with subnormals, rounded to nearest.
#ifndef SEPCONV_FLOAT_MODE_H_
#define SEPCONV_FLOAT_MODE_H_

#include <cstdint>

namespace sepconv {

// Sets that mode for the calling thread and puts the caller's back at the end. Callers differ:
// XLA flushes subnormals to zero while it computes, PyTorch does on request, and a new thread
// inherits what its creator had; without this, results would depend on who called first and on the
// thread that ran a task.
class IeeeMode {
 public:
  IeeeMode() : before_(Read()) {
    if (before_ != kDefault) Write(kDefault);
  }
  ~IeeeMode() {
    if (before_ != kDefault) Write(before_);
  }
  IeeeMode(const IeeeMode&) = delete;
  IeeeMode& operator=(const IeeeMode&) = delete;

 private:
#if defined(__x86_64__)
  using Control = uint32_t;
  static constexpr Control kDefault = 0x1f80;  // MXCSR: every exception masked, nothing else
  static constexpr Control kFlags = 0x3f;      // exceptions seen so far: not a mode
  static Control Read() { return __builtin_ia32_stmxcsr() & ~kFlags; }
  static void Write(Control control) {
    __builtin_ia32_ldmxcsr((__builtin_ia32_stmxcsr() & kFlags) | control);
  }
#elif defined(__aarch64__)
  using Control = uint64_t;
  static constexpr Control kDefault = 0;  // FPCR
  static Control Read() {
    Control control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static void Write(Control control) { asm volatile("msr fpcr, %0" : : "r"(control)); }
#else
  using Control = int;
  static constexpr Control kDefault = 0;
  static Control Read() { return kDefault; }
  static void Write(Control) {}
#endif

  const Control before_;
};

}  // namespace sepconv

#endif  // SEPCONV_FLOAT_MODE_H_

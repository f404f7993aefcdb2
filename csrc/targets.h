// The targets that are compiled in. Which one is used is decided in targets.cc.
#ifndef SEPCONV_TARGETS_H_
#define SEPCONV_TARGETS_H_

#include "kernels.h"

namespace sepconv {

#if defined(__x86_64__)
extern const Target kAmxBf16Target;
extern const Target kAvx512Bf16Target;
extern const Target kAvx512Target;
extern const Target kAvx2Target;
extern const Target kEmulatedAvx512Target;
extern const Target kEmulatedAmxTarget;
#elif defined(__aarch64__)
extern const Target kNeonTarget;
#endif
extern const Target kPortableTarget;

}  // namespace sepconv

#endif  // SEPCONV_TARGETS_H_

// The handlers of XLA's foreign-function interface, as the Python module hands them out.
#ifndef SEPCONV_BIND_XLA_FFI_H_
#define SEPCONV_BIND_XLA_FFI_H_

#include <nanobind/nanobind.h>

namespace sepconv {

// {"sepconv_forward": capsule, "sepconv_backward": capsule}; not built without XLA headers.
nanobind::dict XlaHandlers();

}  // namespace sepconv

#endif  // SEPCONV_BIND_XLA_FFI_H_

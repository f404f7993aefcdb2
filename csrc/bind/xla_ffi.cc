// Buffers of an XLA call -> pointers of sepconv.h. One handler serves every dtype and every choice
// of optional arrays.
#include "bind/xla_ffi.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "sepconv.h"
#include "xla/ffi/api/ffi.h"

namespace sepconv {
namespace {

namespace ffi = xla::ffi;
using Integers = ffi::Span<const int64_t>;

// The arrays that a call can differentiate by, in the order of the flags of `wrt`.
enum Operand { kX = 0, kDepthwiseKernel, kPointwiseKernel, kDepthwiseBias, kBias, kNumOperands };

struct Call {
  Geometry geometry;
  DType dtype;
  ffi::DataType element;
  Sizes sizes;
};

// An array the call must bring: where its address goes, once its size is seen to be right.
template <typename Pointer>
struct Slot {
  const char* name;
  int64_t count;
  Pointer* address;
};

std::optional<DType> ToDType(ffi::DataType element) {
  switch (element) {
    case ffi::F32:
      return DType::kFloat32;
    case ffi::F64:
      return DType::kFloat64;
    case ffi::BF16:
      return DType::kBFloat16;
    case ffi::F16:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

ffi::Error ReadCall(Integers fields, const ffi::RemainingArgs& inputs, Call* call) {
  if (fields.size() != kNumGeometryFields) {
    return ffi::Error::InvalidArgument("`geometry` must have " +
                                       std::to_string(kNumGeometryFields) +
                                       " fields. Received: " + std::to_string(fields.size()));
  }
  std::copy(fields.begin(), fields.end(), reinterpret_cast<int64_t*>(&call->geometry));
  const ffi::ErrorOr<ffi::AnyBuffer> first = inputs.get<ffi::AnyBuffer>(0);
  if (!first) return first.error();
  call->element = first->element_type();
  const std::optional<DType> dtype = ToDType(call->element);
  if (!dtype) {
    return ffi::Error::InvalidArgument(
        "arrays must be float32, float64, bfloat16 or float16. Received: XLA element type " +
        std::to_string(static_cast<int>(call->element)));
  }
  call->dtype = *dtype;
  const std::string fault = Validate(call->geometry, call->dtype, &call->sizes);
  return fault.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(fault);
}

template <typename Pointer>
ffi::Error FillSlot(const Call& call, const ffi::AnyBuffer& buffer, const Slot<Pointer>& slot) {
  const int64_t count = static_cast<int64_t>(buffer.element_count());
  if (buffer.element_type() != call.element || count != slot.count) {
    return ffi::Error::InvalidArgument(
        std::string("`") + slot.name + "` must have " + std::to_string(slot.count) +
        " elements of the dtype of the call. " + "Received: " + std::to_string(count) +
        " elements of XLA type " + std::to_string(static_cast<int>(buffer.element_type())));
  }
  *slot.address = buffer.untyped_data();
  return ffi::Error::Success();
}

ffi::Error FillInputs(const Call& call, const ffi::RemainingArgs& inputs,
                      const std::vector<Slot<const void*>>& slots) {
  if (inputs.size() != slots.size()) {
    return ffi::Error::InvalidArgument("the call must bring " + std::to_string(slots.size()) +
                                       " arrays. Received: " + std::to_string(inputs.size()));
  }
  for (size_t i = 0; i < slots.size(); ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> buffer = inputs.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    if (ffi::Error error = FillSlot(call, *buffer, slots[i]); error.failure()) return error;
  }
  return ffi::Error::Success();
}

ffi::Error FillOutputs(const Call& call, const ffi::RemainingRets& outputs,
                       const std::vector<Slot<void*>>& slots) {
  if (outputs.size() != slots.size()) {
    return ffi::Error::InvalidArgument("the call must return " + std::to_string(slots.size()) +
                                       " arrays. Received: " + std::to_string(outputs.size()));
  }
  for (size_t i = 0; i < slots.size(); ++i) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> buffer = outputs.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    if (ffi::Error error = FillSlot(call, **buffer, slots[i]); error.failure()) return error;
  }
  return ffi::Error::Success();
}

// Inputs in their one order: x, depthwise_kernel, pointwise_kernel, depthwise_bias if any, bias if
// any.
template <typename Args>
void AddOperands(const Call& call, Args* args, std::vector<Slot<const void*>>* slots) {
  slots->push_back({"x", call.sizes.x, &args->x});
  slots->push_back({"depthwise_kernel", call.sizes.depthwise_kernel, &args->depthwise_kernel});
  slots->push_back({"pointwise_kernel", call.sizes.pointwise_kernel, &args->pointwise_kernel});
  if (call.geometry.has_depthwise_bias) {
    slots->push_back({"depthwise_bias", call.sizes.depthwise_bias, &args->depthwise_bias});
  }
  if (call.geometry.has_bias) slots->push_back({"bias", call.sizes.bias, &args->bias});
}

template <typename Function>
ffi::Error Run(Function function) {
  try {
    function();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "sepconv: out of memory for scratch space");
  }
  return ffi::Error::Success();
}

ffi::Error ForwardCall(ffi::RemainingArgs inputs, ffi::RemainingRets outputs, Integers geometry) {
  Call call;
  if (ffi::Error error = ReadCall(geometry, inputs, &call); error.failure()) return error;
  ForwardArgs args = {};
  std::vector<Slot<const void*>> slots;
  AddOperands(call, &args, &slots);
  if (ffi::Error error = FillInputs(call, inputs, slots); error.failure()) return error;
  if (ffi::Error error = FillOutputs(call, outputs, {{"y", call.sizes.y, &args.y}});
      error.failure()) {
    return error;
  }
  return Run([&] { Forward(call.geometry, call.dtype, args); });
}

// `wrt`: a flag for each Operand, whether its gradient is wanted. Results come in that order.
ffi::Error BackwardCall(ffi::RemainingArgs inputs, ffi::RemainingRets outputs, Integers geometry,
                        Integers wrt, bool has_y) {
  Call call;
  if (ffi::Error error = ReadCall(geometry, inputs, &call); error.failure()) return error;
  if (wrt.size() != kNumOperands || (wrt[kDepthwiseBias] && !call.geometry.has_depthwise_bias) ||
      (wrt[kBias] && !call.geometry.has_bias)) {
    return ffi::Error::InvalidArgument("`wrt` must have a flag for each array of the call");
  }
  BackwardArgs args = {};
  std::vector<Slot<const void*>> slots = {{"dy", call.sizes.y, &args.dy}};
  AddOperands(call, &args, &slots);
  if (has_y) slots.push_back({"y", call.sizes.y, &args.y});
  if (ffi::Error error = FillInputs(call, inputs, slots); error.failure()) return error;

  const Slot<void*> gradients[kNumOperands] = {
      {"dx", call.sizes.x, &args.dx},
      {"d_depthwise_kernel", call.sizes.depthwise_kernel, &args.d_depthwise_kernel},
      {"d_pointwise_kernel", call.sizes.pointwise_kernel, &args.d_pointwise_kernel},
      {"d_depthwise_bias", call.sizes.depthwise_bias, &args.d_depthwise_bias},
      {"d_bias", call.sizes.bias, &args.d_bias},
  };
  std::vector<Slot<void*>> wanted;
  for (int i = 0; i < kNumOperands; ++i) {
    if (wrt[i]) wanted.push_back(gradients[i]);
  }
  if (ffi::Error error = FillOutputs(call, outputs, wanted); error.failure()) return error;
  return Run([&] { Backward(call.geometry, call.dtype, args); });
}

XLA_FFI_DEFINE_HANDLER(kForwardHandler, ForwardCall,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attr<Integers>("geometry"));

XLA_FFI_DEFINE_HANDLER(kBackwardHandler, BackwardCall,
                       ffi::Ffi::Bind()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<Integers>("geometry")
                           .Attr<Integers>("wrt")
                           .Attr<bool>("has_y"));

nanobind::capsule ToCapsule(XLA_FFI_Handler* handler) {
  return nanobind::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace

nanobind::dict XlaHandlers() {
  nanobind::dict handlers;
  handlers["sepconv_forward"] = ToCapsule(kForwardHandler);
  handlers["sepconv_backward"] = ToCapsule(kBackwardHandler);
  handlers["api_version"] = nanobind::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  return handlers;
}

}  // namespace sepconv

// sepconv._native: the border between Python arrays and the core.
//
//   forward(geometry, x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias, y, dtype=-1)
//   backward(geometry, dy, x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias, y,
//            dx, d_depthwise_kernel, d_pointwise_kernel, d_depthwise_bias, d_bias, dtype=-1)
//
//   pack(geometry, depthwise_kernel, pointwise_kernel, depthwise_bias, bias, dtype=-1)
//       -> PackedWeights
//   forward_packed(geometry, x, weights, y)
//
// `geometry` is an int64 array of the fields of `Geometry._fields`. Every other array is a
// C-contiguous CPU buffer with the number of elements that the geometry says (its shape is not
// looked at), all of one dtype: float32, float64, float16 or bfloat16. NumPy arrays and anything
// else that speaks DLPack or the buffer protocol will do. Tensors of torch, and whatever else has
// the C exchange interface of DLPack, may have their axes in memory in any order, as long as they
// leave no gaps: the caller knows which order the core expects, and spares himself the views. A
// bias is None exactly when the geometry has none. In `backward`, `y` may be None (it is recomputed
// where the slope of the activation needs it) and so may each gradient (it is not computed); that
// of an absent bias must be.
//
// `pack` copies the weights of many forward calls, which may have other images than its geometry.
// `forward_packed` is `forward` with them; its results are the same.
//
// `dtype` is a code of `DType` (0 float32, 1 float64, 2 bfloat16, 3 float16); -1 takes it from `x`.
// A bfloat16 array of NumPy (ml_dtypes) crosses neither DLPack nor the buffer protocol: pass
// `array.view(np.uint16)` and dtype=2.
//
// TypeError: not an array, or a wrong dtype. ValueError: a geometry that cannot be computed, a
// wrong number of elements, an array that is not contiguous, not aligned, not on the CPU or, for
// outputs, not writable. MemoryError: no scratch. All of these are raised before anything is
// written. The GIL is released while the core runs.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bind/xla_ffi.h"
#include "sepconv.h"

namespace nb = nanobind;

namespace sepconv {
namespace {

constexpr nb::dlpack::dtype kInt64 = {static_cast<uint8_t>(nb::dlpack::dtype_code::Int), 64, 1};
constexpr nb::dlpack::dtype kUInt16 = {static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), 16, 1};

struct DTypeEntry {
  const char* name;
  nb::dlpack::dtype dtype;
};
// In the order of DType.
constexpr DTypeEntry kDTypes[] = {
    {"float32", {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 32, 1}},
    {"float64", {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 64, 1}},
    {"bfloat16", {static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1}},
    {"float16", {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1}},
};
constexpr int64_t kNumDTypes = sizeof(kDTypes) / sizeof(DTypeEntry);
static_assert(kNumDTypes == static_cast<int64_t>(DType::kFloat16) + 1);

std::string Describe(nb::dlpack::dtype dtype) {
  for (const DTypeEntry& entry : kDTypes) {
    if (entry.dtype == dtype) return entry.name;
  }
  const char* kind = dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Int) ? "int"
                     : dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::UInt)
                         ? "uint"
                         : "dtype code ";
  return kind + (*kind == 'd' ? std::to_string(dtype.code) + ", bits " : std::string()) +
         std::to_string(dtype.bits);
}

std::string TypeName(nb::handle value) { return nb::type_name(value.type()).c_str(); }

[[noreturn]] void RaiseValueError(const char* name, const std::string& rule_and_value) {
  throw nb::value_error(("`" + std::string(name) + "` " + rule_and_value).c_str());
}

[[noreturn]] void RaiseTypeError(const char* name, const std::string& rule_and_value) {
  throw nb::type_error(("`" + std::string(name) + "` " + rule_and_value).c_str());
}

// What is known of an array whose owner stays alive for the call.
struct View {
  void* data = nullptr;
  nb::dlpack::dtype dtype = {};
  int32_t device_type = 0;
  int64_t size = 0;
  bool is_dense = false;
};

bool IsContiguous(int64_t size, size_t ndim, const int64_t* shape, const int64_t* strides) {
  // NumPy gives empty arrays strides of its own choice; DLPack may leave out those of dense ones.
  if (size == 0 || strides == nullptr) return true;
  int64_t expected = 1;
  for (size_t i = ndim; i-- > 0;) {
    if (shape[i] > 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

// The axes in some order are those of a contiguous array.
bool HasNoGaps(int64_t size, size_t ndim, const int64_t* shape, const int64_t* strides) {
  if (IsContiguous(size, ndim, shape, strides)) return true;
  int64_t expected = 1;
  for (bool found = true; found && expected < size;) {
    found = false;
    for (size_t i = 0; i < ndim && !found; ++i) {
      if (shape[i] > 1 && strides[i] == expected) {
        expected *= shape[i];
        found = true;
      }
    }
  }
  return expected == size;
}

// The C exchange interface of DLPack: a capsule of function pointers on the type of an array. It
// costs a tenth of an exchange through the Python methods. Of the table, which is stable within a
// major version, this is the part up to the one function that is needed.
struct ExchangeTable {
  uint32_t major_version, minor_version;
  const ExchangeTable* previous;
  void* managed_tensor_functions[3];
  int (*borrow)(void* object, nb::dlpack::dltensor* out);
};

// The function that describes objects of this type without taking them over, or null.
auto BorrowFunction(nb::handle value) -> decltype(ExchangeTable::borrow) {
  // What has the buffer protocol, as NumPy's arrays, is not asked: a missing attribute costs more.
  if (PyObject_CheckBuffer(value.ptr())) return nullptr;
  const nb::object capsule = nb::getattr(value.type(), "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* table =
      static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table != nullptr && table->major_version != 1) table = table->previous;
  return table == nullptr ? nullptr : table->borrow;
}

// The arrays of one call: each is checked against what the geometry says and held until the call
// ends.
class CallArrays {
 public:
  // Reads the geometry; every later size follows from it. The array of that name says the dtype.
  CallArrays(nb::handle geometry, const char* name, nb::handle array, int64_t dtype_code)
      : name_(name) {
    const View fields = Import<Array>("geometry", geometry);
    if (fields.dtype != kInt64)
      RaiseTypeError("geometry", "must be int64. Received: " + Describe(fields.dtype));
    CheckMemory("geometry", fields, kNumGeometryFields, alignof(int64_t));
    std::memcpy(&geometry_, fields.data, sizeof(Geometry));

    element_ = array.is_none() ? kDTypes[0].dtype : Import<Array>(name, array).dtype;
    if (dtype_code == -1) {
      dtype_code = CodeOf(element_);
    } else if (dtype_code < 0 || dtype_code >= kNumDTypes) {
      RaiseValueError("dtype", "must be -1 or a code from 0 to 3. Received: dtype=" +
                                   std::to_string(dtype_code));
    } else if (!(element_ == kDTypes[dtype_code].dtype ||
                 (element_ == kUInt16 && kDTypes[dtype_code].dtype.bits == 16))) {
      RaiseTypeError(name, "must hold " + std::string(kDTypes[dtype_code].name) +
                               ". Received: " + Describe(element_));
    }
    dtype_ = static_cast<DType>(dtype_code);

    const std::string problem = Validate(geometry_, dtype_, &sizes_);
    if (!problem.empty()) throw nb::value_error(problem.c_str());
  }

  const Geometry& geometry() const { return geometry_; }
  DType dtype() const { return dtype_; }
  const Sizes& sizes() const { return sizes_; }

  const void* Input(const char* name, nb::handle value, int64_t size) {
    const View view = Import<Array>(name, value);
    CheckElements(name, view, size);
    return view.data;
  }

  const void* OptionalInput(const char* name, nb::handle value, int64_t size) {
    return value.is_none() ? nullptr : Input(name, value, size);
  }

  const void* Bias(const char* name, nb::handle value, int64_t present, int64_t size) {
    if (value.is_none() != (present == 0)) {
      RaiseValueError(name, "must be an array exactly when the geometry has one. Received: " +
                                TypeName(value) + ", has_" + name + "=" + std::to_string(present));
    }
    return OptionalInput(name, value, size);
  }

  // The weights of a call, forward or backward.
  template <typename Args>
  void ReadWeights(nb::handle depthwise_kernel, nb::handle pointwise_kernel,
                   nb::handle depthwise_bias, nb::handle bias, Args& args) {
    args.depthwise_kernel = Input("depthwise_kernel", depthwise_kernel, sizes_.depthwise_kernel);
    args.pointwise_kernel = Input("pointwise_kernel", pointwise_kernel, sizes_.pointwise_kernel);
    args.depthwise_bias =
        Bias("depthwise_bias", depthwise_bias, geometry_.has_depthwise_bias, sizes_.depthwise_bias);
    args.bias = Bias("bias", bias, geometry_.has_bias, sizes_.bias);
  }

  void* Output(const char* name, nb::handle value, int64_t size) {
    const View view = Import<WritableArray>(name, value);
    CheckElements(name, view, size);
    return view.data;
  }

  void* OptionalOutput(const char* name, nb::handle value, int64_t size) {
    return value.is_none() ? nullptr : Output(name, value, size);
  }

  void* BiasGradient(const char* name, nb::handle value, int64_t present, int64_t size) {
    if (!value.is_none() && !present) {
      RaiseValueError(
          name, "must be None where the geometry has no such bias. Received: " + TypeName(value));
    }
    return OptionalOutput(name, value, size);
  }

 private:
  using Array = nb::ndarray<nb::ro>;
  using WritableArray = nb::ndarray<>;

  template <typename T>
  View Import(const char* name, nb::handle value) {
    nb::dlpack::dltensor tensor;  // Its shape and strides belong to the object.
    if (const auto borrow = BorrowFunction(value); borrow != nullptr) {
      if (borrow(value.ptr(), &tensor) == 0) {
        View view = {static_cast<char*>(tensor.data) + tensor.byte_offset, tensor.dtype,
                     tensor.device.device_type, 1};
        for (int32_t i = 0; i < tensor.ndim; ++i) view.size *= tensor.shape[i];
        view.is_dense = HasNoGaps(view.size, tensor.ndim, tensor.shape, tensor.strides);
        return view;
      }
      PyErr_Clear();  // The slow way below has the better words for it.
    }
    T array;
    if (!value.is_none() && nb::try_cast(value, array, /*convert=*/false)) {
      View view = {const_cast<void*>(array.data()), array.dtype(), array.device_type(),
                   static_cast<int64_t>(array.size())};
      view.is_dense = IsContiguous(view.size, array.ndim(), array.shape_ptr(), array.stride_ptr());
      Keep(std::move(array));
      return view;
    }
    Array readable;
    if (!value.is_none() && nb::try_cast(value, readable, /*convert=*/false)) {
      RaiseValueError(name, "must be writable. Received: a read-only " + TypeName(value));
    }
    RaiseTypeError(
        name,
        "must be an array that DLPack or the buffer protocol hands out. Received: " +
            TypeName(value) +
            (nb::hasattr(value, "dtype")
                 ? " of dtype " +
                       std::string(nb::str(nb::handle(nb::object(value.attr("dtype")))).c_str())
                 : std::string()));
  }

  void Keep(Array&& array) { inputs_[num_inputs_++] = std::move(array); }
  void Keep(WritableArray&& array) { outputs_[num_outputs_++] = std::move(array); }

  int64_t CodeOf(nb::dlpack::dtype dtype) const {
    for (int64_t code = 0; code < kNumDTypes; ++code) {
      if (kDTypes[code].dtype == dtype) return code;
    }
    RaiseTypeError(name_,
                   "must hold float32, float64, float16 or bfloat16. Received: " + Describe(dtype));
  }

  void CheckElements(const char* name, const View& view, int64_t size) const {
    if (view.dtype != element_) {
      RaiseTypeError(name, "must have the dtype of `" + std::string(name_) + "`, " +
                               Describe(element_) + ". Received: " + Describe(view.dtype));
    }
    CheckMemory(name, view, size, ElementSize(dtype_));
  }

  static void CheckMemory(const char* name, const View& view, int64_t size, size_t alignment) {
    if (view.device_type != nb::device::cpu::value) {
      RaiseValueError(
          name, "must be in CPU memory. Received: device type " + std::to_string(view.device_type));
    }
    if (view.size != size) {
      RaiseValueError(name, "must have " + std::to_string(size) +
                                " elements. Received: " + std::to_string(view.size));
    }
    if (size > 0 && view.data == nullptr)
      RaiseValueError(name, "must have memory. Received: an array without data");
    if (!view.is_dense) RaiseValueError(name, "must be C-contiguous. Received: a strided array");
    if (size > 0 && reinterpret_cast<uintptr_t>(view.data) % alignment != 0) {
      RaiseValueError(name, "must be aligned to its element size. Received: an unaligned array");
    }
  }

  const char* name_;
  Geometry geometry_;
  nb::dlpack::dtype element_;
  DType dtype_;
  Sizes sizes_;
  Array inputs_[9];  // The geometry and `x`, read for its dtype, among them.
  WritableArray outputs_[5];
  int num_inputs_ = 0;
  int num_outputs_ = 0;
};

// Calls that have released the GIL, and whether the interpreter ends; read and written by those who
// hold it. A thread that asks for the GIL of an interpreter that ends is ended there and then, and
// its C++ frames would abort the process: so the end waits for these calls, and a later call keeps
// the GIL.
int64_t calls_without_gil = 0;
bool interpreter_ends = false;

class ReleasedGil {
 public:
  ReleasedGil() {
    if (interpreter_ends) return;
    ++calls_without_gil;
    state_ = PyEval_SaveThread();
  }
  ~ReleasedGil() {
    if (state_ == nullptr) return;
    PyEval_RestoreThread(state_);
    --calls_without_gil;
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_ = nullptr;
};

void AwaitCalls() {
  interpreter_ends = true;
  while (calls_without_gil > 0) {
    nb::gil_scoped_release release;
    usleep(1000);
  }
}

void PyForward(nb::handle geometry, nb::handle x, nb::handle depthwise_kernel,
               nb::handle pointwise_kernel, nb::handle depthwise_bias, nb::handle bias,
               nb::handle y, int64_t dtype) {
  CallArrays arrays(geometry, "x", x, dtype);
  const Geometry& g = arrays.geometry();
  const Sizes& sizes = arrays.sizes();
  ForwardArgs args;
  args.x = arrays.Input("x", x, sizes.x);
  arrays.ReadWeights(depthwise_kernel, pointwise_kernel, depthwise_bias, bias, args);
  args.y = arrays.Output("y", y, sizes.y);
  const ReleasedGil released;
  Forward(g, arrays.dtype(), args);
}

// Held by Python, which cannot hold what is not complete.
struct PyPackedWeights {
  std::shared_ptr<const PackedWeights> weights;
};

PyPackedWeights PyPack(nb::handle geometry, nb::handle depthwise_kernel,
                       nb::handle pointwise_kernel, nb::handle depthwise_bias, nb::handle bias,
                       int64_t dtype) {
  CallArrays arrays(geometry, "depthwise_kernel", depthwise_kernel, dtype);
  ForwardArgs args = {};
  arrays.ReadWeights(depthwise_kernel, pointwise_kernel, depthwise_bias, bias, args);
  const ReleasedGil released;
  return {PackWeights(arrays.geometry(), arrays.dtype(), args)};
}

void PyForwardPacked(nb::handle geometry, nb::handle x, const PyPackedWeights& packed,
                     nb::handle y) {
  const PackedWeights& weights = *packed.weights;
  CallArrays arrays(geometry, "x", x, static_cast<int64_t>(DTypeOf(weights)));
  if (!Fit(weights, arrays.geometry())) {
    RaiseValueError("weights",
                    "must have the kernel size, channels, filters and biases of the geometry. "
                    "Received: others");
  }
  const void* in = arrays.Input("x", x, arrays.sizes().x);
  void* out = arrays.Output("y", y, arrays.sizes().y);
  const ReleasedGil released;
  ForwardPacked(arrays.geometry(), weights, in, out);
}

void PyBackward(nb::handle geometry, nb::handle dy, nb::handle x, nb::handle depthwise_kernel,
                nb::handle pointwise_kernel, nb::handle depthwise_bias, nb::handle bias,
                nb::handle y, nb::handle dx, nb::handle d_depthwise_kernel,
                nb::handle d_pointwise_kernel, nb::handle d_depthwise_bias, nb::handle d_bias,
                int64_t dtype) {
  CallArrays arrays(geometry, "x", x, dtype);
  const Geometry& g = arrays.geometry();
  const Sizes& sizes = arrays.sizes();
  BackwardArgs args;
  args.dy = arrays.Input("dy", dy, sizes.y);
  args.x = arrays.Input("x", x, sizes.x);
  arrays.ReadWeights(depthwise_kernel, pointwise_kernel, depthwise_bias, bias, args);
  args.y = arrays.OptionalInput("y", y, sizes.y);
  args.dx = arrays.OptionalOutput("dx", dx, sizes.x);
  args.d_depthwise_kernel =
      arrays.OptionalOutput("d_depthwise_kernel", d_depthwise_kernel, sizes.depthwise_kernel);
  args.d_pointwise_kernel =
      arrays.OptionalOutput("d_pointwise_kernel", d_pointwise_kernel, sizes.pointwise_kernel);
  args.d_depthwise_bias = arrays.BiasGradient("d_depthwise_bias", d_depthwise_bias,
                                              g.has_depthwise_bias, sizes.depthwise_bias);
  args.d_bias = arrays.BiasGradient("d_bias", d_bias, g.has_bias, sizes.bias);
  const ReleasedGil released;
  Backward(g, arrays.dtype(), args);
}

nb::tuple TupleOfStrings(const std::vector<std::string>& strings) {
  nb::list list;
  for (const std::string& string : strings) list.append(nb::str(string.c_str(), string.size()));
  return nb::tuple(list);
}

void PySetNumThreads(int64_t num_threads) {
  if (num_threads < 0) {
    RaiseValueError("num_threads",
                    "must be at least 0. Received: num_threads=" + std::to_string(num_threads));
  }
  SetNumThreads(num_threads);
}

void PySetTarget(const char* name) {
  if (SetTarget(name)) return;
  std::string rule = "must be \"\" or a target that this CPU runs:";
  for (const std::string& target : AvailableTargets()) rule.append(" ").append(target);
  RaiseValueError("name", rule + ". Received: name=\"" + name + "\"");
}

DType DTypeOfName(const char* dtype_name) {
  for (int64_t code = 0; code < kNumDTypes; ++code) {
    if (std::strcmp(dtype_name, kDTypes[code].name) == 0) return static_cast<DType>(code);
  }
  RaiseValueError("dtype_name",
                  "must be float32, float64, bfloat16 or float16. Received: dtype_name=\"" +
                      std::string(dtype_name) + "\"");
}

nb::dict PyTileConstants(const char* dtype_name) {
  const TileConstants constants = CurrentTileConstants(DTypeOfName(dtype_name));
  nb::dict result;
  result["lanes"] = constants.lanes;
  result["rows"] = constants.rows;
  result["columns"] = constants.columns;
  result["forward_pixels"] = constants.forward_pixels;
  result["backward_pixels"] = constants.backward_pixels;
  result["backward_channels"] = constants.backward_channels;
  result["backward_slab_pixels"] = constants.backward_slab_pixels;
  return result;
}

nb::dict PyPlan(const std::vector<int64_t>& numbers, const char* dtype_name, bool backward) {
  const DType dtype = DTypeOfName(dtype_name);
  if (numbers.size() != kNumGeometryFields) {
    RaiseValueError("geometry", "must have " + std::to_string(kNumGeometryFields) +
                                    " integers. Received: " + std::to_string(numbers.size()));
  }
  Geometry geometry;
  std::memcpy(&geometry, numbers.data(), sizeof(geometry));
  const std::string problem = Validate(geometry, dtype, nullptr);
  if (!problem.empty()) throw nb::value_error(problem.c_str());
  nb::dict result;
  for (const auto& [name, value] :
       backward ? PlanBackward(geometry, dtype) : PlanForward(geometry, dtype))
    result[name] = value;
  return result;
}

double PyFmaPeakGflops(const char* dtype_name) {
  const DType dtype = DTypeOfName(dtype_name);
  const ReleasedGil released;
  return FmaPeakGflops(dtype);
}

bool PySlopeFollowsFromOutput(int64_t code) {
  if (code < 0 || code >= kNumActivations) {
    RaiseValueError("code",
                    "must be the index of an activation. Received: code=" + std::to_string(code));
  }
  return SlopeFollowsFromOutput(static_cast<Activation>(code));
}

}  // namespace

NB_MODULE(_native, module) {
  // Without this, CPython 3.11 would let the module in, and its objects would be shared.
  if (PyInterpreterState_GetID(PyInterpreterState_Get()) != 0) {
    throw nb::import_error("`sepconv._native` runs in the main interpreter only");
  }
  const char* forced_target = std::getenv("SEPCONV_TARGET");
  if (forced_target && *forced_target && !SetTarget(forced_target)) {
    std::string message = "`SEPCONV_TARGET` must name a target that this CPU runs:";
    for (const std::string& target : AvailableTargets()) message.append(" ").append(target);
    message.append(". Received: SEPCONV_TARGET=").append(forced_target);
    throw nb::import_error(message.c_str());
  }

  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&AwaitCalls));
  // A forked child has none of the other threads and their calls.
  nb::module_::import_("os").attr("register_at_fork")(
      nb::arg("after_in_child") = nb::cpp_function([] { calls_without_gil = 0; }));

  module.doc() =
      "The native core of sepconv; not public. The doors check their arguments and call it.";

  module.def("forward", &PyForward, nb::arg("geometry"), nb::arg("x"), nb::arg("depthwise_kernel"),
             nb::arg("pointwise_kernel"), nb::arg("depthwise_bias").none(), nb::arg("bias").none(),
             nb::arg("y"), nb::arg("dtype") = -1, "Fills `y`.");
  nb::class_<PyPackedWeights>(module, "PackedWeights");
  module.def("pack", &PyPack, nb::arg("geometry"), nb::arg("depthwise_kernel"),
             nb::arg("pointwise_kernel"), nb::arg("depthwise_bias").none(), nb::arg("bias").none(),
             nb::arg("dtype") = -1, "Copies and packs weights.");
  module.def("forward_packed", &PyForwardPacked, nb::arg("geometry"), nb::arg("x"),
             nb::arg("weights"), nb::arg("y"), "Fills `y`.");
  module.def("backward", &PyBackward, nb::arg("geometry"), nb::arg("dy"), nb::arg("x"),
             nb::arg("depthwise_kernel"), nb::arg("pointwise_kernel"),
             nb::arg("depthwise_bias").none(), nb::arg("bias").none(), nb::arg("y").none(),
             nb::arg("dx").none(), nb::arg("d_depthwise_kernel").none(),
             nb::arg("d_pointwise_kernel").none(), nb::arg("d_depthwise_bias").none(),
             nb::arg("d_bias").none(), nb::arg("dtype") = -1,
             "Fills the gradients that are not None.");

  module.def("geometry_fields", [] {
#define SEPCONV_FIELD(name) #name,
    return TupleOfStrings({SEPCONV_GEOMETRY_FIELDS(SEPCONV_FIELD)});
#undef SEPCONV_FIELD
  });
  module.def("activations", [] {
    return TupleOfStrings({std::begin(kActivationNames), std::end(kActivationNames)});
  });
  module.def("slope_follows_from_output", &PySlopeFollowsFromOutput, nb::arg("code"));

  module.def("set_num_threads", &PySetNumThreads, nb::arg("num_threads"));
  module.def("get_num_threads", &GetNumThreads);
  module.def("cpu_target", [] { return nb::str(CurrentTarget().c_str()); });
  module.def("available_targets", [] { return TupleOfStrings(AvailableTargets()); });
  module.def("set_target", &PySetTarget, nb::arg("name"));
  module.def("tile_constants", &PyTileConstants, nb::arg("dtype_name"));
  module.def("plan", &PyPlan, nb::arg("geometry"), nb::arg("dtype_name"), nb::arg("backward"));
  module.def("fma_peak_gflops", &PyFmaPeakGflops, nb::arg("dtype_name") = "float32");

#ifdef SEPCONV_WITH_XLA
  module.def("xla_handlers", &XlaHandlers);
#else
  module.def("xla_handlers", [] { return nb::dict(); });
#endif
}

}  // namespace sepconv

// torch_ext._runtime: the C interface of torch_ext_runtime.h for Python, on the limited API of Python 3.10. What users see
// is torch_ext/runtime.py. Longer than other files, since it is one table of types and methods, each some lines of
// Python's C API.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../../include/torch_ext_runtime.h"
#include "python/float_text.h"
#include "python/python_abi.h"

namespace {

// ---- DLPack (its ABI of version 0, which all libraries take and give) --------------------------------------------------

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor* self);
};
constexpr int32_t kDLCpu = 1;
constexpr uint8_t kDLInt = 0, kDLFloat = 2;

// ---- small helpers --------------------------------------------------------------------------------------------------

struct Release {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

PyObject* exception_of(txr_status status) {
  switch (status) {
    case TXR_ERROR_VALUE:
      return PyExc_ValueError;
    case TXR_ERROR_TYPE:
      return PyExc_TypeError;
    case TXR_ERROR_NOT_FOUND:
      return PyExc_FileNotFoundError;
    case TXR_ERROR_SYSTEM:
      return PyExc_OSError;
    case TXR_ERROR_MEMORY:
      return PyExc_MemoryError;
    default:
      return PyExc_RuntimeError;
  }
}

// Calls fn(error) without the GIL; false with an exception set if it failed.
template <typename F>
bool call(const F& fn) {
  txr_error error = {};
  error.struct_size = sizeof error;
  txr_status status;
  PyThreadState* const state = PyEval_SaveThread();
  status = fn(&error);
  PyEval_RestoreThread(state);
  if (status == TXR_OK) return true;
  // Paths need not be UTF-8.
  const Owned message(
      PyUnicode_DecodeUTF8(error.message, static_cast<Py_ssize_t>(std::strlen(error.message)), "replace"));
  if (message) PyErr_SetObject(exception_of(status), message.get());
  return false;
}

// ---- integers of others ---------------------------------------------------------------------------------------------

// A one-dimensional vector of T in the memory of its owner, or copied where its elements are not adjacent.
template <typename T>
class Integers {
 public:
  Integers() = default;
  Integers(const Integers&) = delete;
  Integers& operator=(const Integers&) = delete;
  ~Integers() {
    if (has_buffer_) PyBuffer_Release(&buffer_);
    if (managed_ && managed_->deleter) managed_->deleter(managed_);
  }

  const T* data() const { return data_; }
  size_t size() const { return size_; }

  // False with an exception set if `object` is no such vector.
  bool read(PyObject* object, const char* name) {
    if (PyObject_CheckBuffer(object)) return read_buffer(object, name);
    if (PyObject_HasAttrString(object, "__dlpack__")) return read_dlpack(object, name);
    const Owned type(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__"));
    PyErr_Format(PyExc_TypeError, "Encoder: expected %s as an array of int%d (buffer protocol or DLPack), got %U", name,
                 static_cast<int>(8 * sizeof(T)), type.get());
    return false;
  }

 private:
  bool wrong_type(const char* name, const char* got) {
    PyErr_Format(PyExc_TypeError, "Encoder: expected %s of int%d, got %s", name, static_cast<int>(8 * sizeof(T)), got);
    return false;
  }
  bool wrong_shape(const char* name, int dimensions) {
    PyErr_Format(
        PyExc_ValueError,
        "Encoder: expected %s with 1 dimension, got %d: texts are concatenated without padding, and cu_seqlens "
        "says where each begins",
        name, dimensions);
    return false;
  }

  bool take(const char* data, Py_ssize_t count, Py_ssize_t stride_bytes) {
    size_ = static_cast<size_t>(count);
    if (stride_bytes == static_cast<Py_ssize_t>(sizeof(T)) && reinterpret_cast<uintptr_t>(data) % alignof(T) == 0) {
      data_ = reinterpret_cast<const T*>(data);
      return true;
    }
    try {
      copy_.resize(size_ + 1);
    } catch (const std::exception&) {  // no memory, or more than vectors hold: a view may repeat one element for ever
      PyErr_Format(PyExc_MemoryError, "Encoder: no memory for a copy of %zu integers", size_);
      return false;
    }
    for (size_t i = 0; i < size_; ++i) {
      std::memcpy(&copy_[i], data + static_cast<Py_ssize_t>(i) * stride_bytes, sizeof(T));
    }
    data_ = copy_.data();
    return true;
  }

  bool read_buffer(PyObject* object, const char* name) {
    if (PyObject_GetBuffer(object, &buffer_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) return false;
    has_buffer_ = true;
    const char* const format = buffer_.format ? buffer_.format : "B";
    const char kind = std::strlen(format) == 2 && std::strchr("@=<", format[0]) ? format[1] : format[0];
    const bool single = std::strlen(format) == 1 || (std::strlen(format) == 2 && std::strchr("@=<", format[0]));
    if (!single || !std::strchr("ilq", kind) || buffer_.itemsize != static_cast<Py_ssize_t>(sizeof(T))) {
      return wrong_type(name, format);
    }
    if (buffer_.ndim != 1) return wrong_shape(name, buffer_.ndim);
    return take(static_cast<const char*>(buffer_.buf), buffer_.shape[0],
                buffer_.strides ? buffer_.strides[0] : buffer_.itemsize);
  }

  bool read_dlpack(PyObject* object, const char* name) {
    const Owned capsule(PyObject_CallMethod(object, "__dlpack__", nullptr));
    if (!capsule) return false;
    auto* const managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.get(), "dltensor"));
    if (!managed || PyCapsule_SetName(capsule.get(), "used_dltensor") != 0) return false;
    managed_ = managed;
    const DLTensor& t = managed->tensor;
    if (t.device.type != kDLCpu) {
      PyErr_Format(PyExc_ValueError, "Encoder: expected %s on the CPU, got a tensor on a device of type %d", name,
                   t.device.type);
      return false;
    }
    if (t.dtype.code != kDLInt || t.dtype.bits != 8 * sizeof(T) || t.dtype.lanes != 1) {
      static constexpr const char* kKinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
      const bool known = t.dtype.code < sizeof kKinds / sizeof kKinds[0];
      const std::string got = (known ? kKinds[t.dtype.code] : "type ") + std::to_string(t.dtype.bits);
      return wrong_type(name, got.c_str());
    }
    if (t.ndim != 1) return wrong_shape(name, t.ndim);
    const int64_t stride = t.strides ? t.strides[0] : 1;
    return take(static_cast<const char*>(t.data) + t.byte_offset, static_cast<Py_ssize_t>(t.shape[0]),
                static_cast<Py_ssize_t>(stride * static_cast<int64_t>(sizeof(T))));
  }

  Py_buffer buffer_ = {};
  bool has_buffer_ = false;
  DLManagedTensor* managed_ = nullptr;
  std::vector<T> copy_;
  const T* data_ = nullptr;
  size_t size_ = 0;
};

// ---- Array: results -------------------------------------------------------------------------------------------------

PyTypeObject *array_type, *states_type, *encoder_type;

// A matrix of fp32 or int64 that owns its memory; never changes its size.
struct Array {
  PyObject_HEAD void* data;
  Py_ssize_t shape[2], strides[2];
  Py_ssize_t itemsize;
  char format[2];  // "f" or "q"
};

template <typename T>
Array* new_array(size_t rows, size_t columns) {
  const bool wanted = rows <= size_t{PTRDIFF_MAX} / sizeof(T) / (columns ? columns : 1);
  void* const data = wanted ? std::malloc(rows * columns * sizeof(T) + 1) : nullptr;
  if (!data) {
    PyErr_Format(PyExc_MemoryError, "Encoder: no memory for a result of %zu x %zu elements", rows, columns);
    return nullptr;
  }
  auto* const allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(array_type, Py_tp_alloc));
  auto* const self = reinterpret_cast<Array*>(allocate(array_type, 0));
  if (!self) {
    std::free(data);
    return nullptr;
  }
  self->data = data;
  self->itemsize = sizeof(T);
  self->shape[0] = static_cast<Py_ssize_t>(rows);
  self->shape[1] = static_cast<Py_ssize_t>(columns);
  self->strides[0] = static_cast<Py_ssize_t>(columns * sizeof(T));
  self->strides[1] = sizeof(T);
  std::strcpy(self->format, sizeof(T) == 4 ? "f" : "q");
  return self;
}

void free_object(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

void array_dealloc(PyObject* self) {
  std::free(reinterpret_cast<Array*>(self)->data);
  free_object(self);
}

int array_getbuffer(PyObject* object, Py_buffer* view, int flags) {
  auto* const self = reinterpret_cast<Array*>(object);
  view->obj = nullptr;
  if ((flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS && self->shape[0] > 1 && self->shape[1] > 1) {
    PyErr_SetString(PyExc_BufferError, "Array: its elements lie row after row, not column after column");
    return -1;
  }
  view->buf = self->data;
  view->obj = Py_NewRef(object);
  view->len = self->shape[0] * self->strides[0];
  view->itemsize = self->itemsize;
  view->readonly = 0;
  view->ndim = 2;
  view->format = flags & PyBUF_FORMAT ? self->format : nullptr;
  view->shape = flags & PyBUF_ND ? self->shape : nullptr;
  view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? self->strides : nullptr;
  view->suboffsets = nullptr;
  view->internal = nullptr;
  return 0;
}

// What a DLPack capsule of ours holds on to.
struct SharedArray {
  DLManagedTensor managed;
  PyObject* array;
  int64_t shape[2], strides[2];
};

void delete_shared(DLManagedTensor* managed) {
  auto* const shared = static_cast<SharedArray*>(managed->context);
  if (!Py_IsInitialized()) return;  // the end of the program: somebody kept it until after Python
  const PyGILState_STATE state = PyGILState_Ensure();
  Py_DECREF(shared->array);
  PyGILState_Release(state);
  delete shared;
}

void delete_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // somebody took it over
  auto* const managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

template <typename T>
PyObject* copy_of(const Array& from) {
  Array* const copy = new_array<T>(static_cast<size_t>(from.shape[0]), static_cast<size_t>(from.shape[1]));
  if (copy) std::memcpy(copy->data, from.data, static_cast<size_t>(from.shape[0] * from.strides[0]));
  return reinterpret_cast<PyObject*>(copy);
}

// The options are those of the array API: stream, max_version, dl_device and copy.
PyObject* array_dlpack(PyObject* object, PyObject*, PyObject* options) {
  PyObject* const device = options ? PyDict_GetItemString(options, "dl_device") : nullptr;
  if (device && device != Py_None) {
    int type, id;
    if (!PyArg_ParseTuple(device, "ii", &type, &id)) return nullptr;
    if (type != kDLCpu) return PyErr_Format(PyExc_BufferError, "Array: it is on the CPU, not on device type %d", type);
  }
  Owned copied;
  if (options && PyDict_GetItemString(options, "copy") == Py_True) {
    const auto& from = *reinterpret_cast<Array*>(object);
    copied.reset(from.format[0] == 'f' ? copy_of<float>(from) : copy_of<int64_t>(from));
    if (!copied) return nullptr;
    object = copied.get();
  }
  auto* const self = reinterpret_cast<Array*>(object);
  auto* const shared = new (std::nothrow) SharedArray{};
  if (!shared) return PyErr_NoMemory();
  shared->array = Py_NewRef(object);
  shared->shape[0] = self->shape[0];
  shared->shape[1] = self->shape[1];
  shared->strides[0] = self->shape[1];
  shared->strides[1] = 1;
  DLTensor& t = shared->managed.tensor;
  t.data = self->data;
  t.device = {kDLCpu, 0};
  t.ndim = 2;
  t.dtype = {self->format[0] == 'f' ? kDLFloat : kDLInt, static_cast<uint8_t>(8 * self->itemsize), 1};
  t.shape = shared->shape;
  t.strides = shared->strides;
  shared->managed.context = shared;
  shared->managed.deleter = delete_shared;
  PyObject* const capsule = PyCapsule_New(&shared->managed, "dltensor", delete_capsule);
  if (!capsule) delete_shared(&shared->managed);
  return capsule;
}

PyObject* array_dlpack_device(PyObject*, PyObject*) { return Py_BuildValue("(ii)", kDLCpu, 0); }

PyObject* array_shape(PyObject* object, void*) {
  const auto* const self = reinterpret_cast<Array*>(object);
  return Py_BuildValue("(nn)", self->shape[0], self->shape[1]);
}

PyObject* array_tolist(PyObject* object, PyObject*) {
  const Owned view(PyMemoryView_FromObject(object));
  return view ? PyObject_CallMethod(view.get(), "tolist", nullptr) : nullptr;
}

PyObject* array_repr(PyObject* object) {
  const auto* const self = reinterpret_cast<Array*>(object);
  const char* const dtype = self->itemsize == 4 ? "fp32" : "int64";
  return PyUnicode_FromFormat("Array(shape=(%zd, %zd), dtype=%s)", self->shape[0], self->shape[1], dtype);
}

Py_ssize_t array_length(PyObject* object) { return reinterpret_cast<Array*>(object)->shape[0]; }

PyMethodDef array_methods[] = {{"__dlpack__", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(array_dlpack)),
                                METH_VARARGS | METH_KEYWORDS, "A DLPack capsule over this memory."},
                               {"__dlpack_device__", array_dlpack_device, METH_NOARGS, "The CPU."},
                               {"tolist", array_tolist, METH_NOARGS, "Rows as lists of Python numbers."},
                               {nullptr, nullptr, 0, nullptr}};
PyGetSetDef array_getset[] = {{"shape", array_shape, nullptr, "Rows and columns.", nullptr},
                              {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyType_Slot array_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(array_dealloc)},
    {Py_tp_methods, array_methods},
    {Py_tp_getset, array_getset},
    {Py_tp_repr, reinterpret_cast<void*>(array_repr)},
    {Py_sq_length, reinterpret_cast<void*>(array_length)},
    {Py_bf_getbuffer, reinterpret_cast<void*>(array_getbuffer)},
    {Py_tp_doc, const_cast<char*>("Rows of fp32 or int64 numbers: numpy.asarray() and torch.from_dlpack() take it "
                                  "without a copy.")},
    {0, nullptr}};
PyType_Spec array_spec = {"torch_ext._runtime.Array", sizeof(Array), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, array_slots};

// ---- States ---------------------------------------------------------------------------------------------------------

struct StatesObject {
  PyObject_HEAD txr_states* states;
  size_t tokens, texts, hidden_size, embedding_size, outputs;
  bool projects;  // A head for feature-extraction comes after the pooling.
};

void states_dealloc(PyObject* self) {
  txr_free_states(reinterpret_cast<StatesObject*>(self)->states);
  free_object(self);
}

// A new array [rows, columns] of fp32 that fn(out, count, error) fills.
template <typename F>
PyObject* filled(size_t rows, size_t columns, const F& fn) {
  Array* const array = new_array<float>(rows, columns);
  if (!array) return nullptr;
  auto* const out = static_cast<float*>(array->data);
  if (call([&](txr_error* error) { return fn(out, rows * columns, error); })) return reinterpret_cast<PyObject*>(array);
  Py_DECREF(array);
  return nullptr;
}

PyObject* states_hidden(PyObject* object, PyObject*) {
  const auto& s = *reinterpret_cast<StatesObject*>(object);
  return filled(s.tokens, s.hidden_size,
                [&](float* out, size_t count, txr_error* error) { return txr_hidden(s.states, out, count, error); });
}

PyObject* states_pool(PyObject* object, PyObject* args) {
  const auto& s = *reinterpret_cast<StatesObject*>(object);
  const char* mode;
  int normalize;
  Py_ssize_t dimensions, skipped = 0;
  if (!PyArg_ParseTuple(args, "spn|n", &mode, &normalize, &dimensions, &skipped)) return nullptr;
  // Vectors of several poolings stand side by side.
  const auto joins = static_cast<size_t>(std::count(mode, mode + std::strlen(mode), '+'));
  const size_t width = s.projects ? s.embedding_size : s.embedding_size * (1 + joins);
  if (dimensions < 0 || static_cast<size_t>(dimensions) > width) {
    return PyErr_Format(PyExc_ValueError, "Encoder: expected dimensions from 0 to %zu, got %zd", width, dimensions);
  }
  if (skipped < 0) {
    return PyErr_Format(PyExc_ValueError, "Encoder: expected skipped tokens of at least 0, got %zd", skipped);
  }
  const txr_pooling pooling = {sizeof pooling, mode, normalize, static_cast<size_t>(dimensions),
                               static_cast<size_t>(skipped)};
  return filled(
      s.texts, dimensions ? static_cast<size_t>(dimensions) : width,
      [&](float* out, size_t count, txr_error* error) { return txr_pool(s.states, &pooling, out, count, error); });
}

PyObject* states_token_vectors(PyObject* object, PyObject* args) {
  const auto& s = *reinterpret_cast<StatesObject*>(object);
  int normalize;
  if (!PyArg_ParseTuple(args, "p", &normalize)) return nullptr;
  return filled(s.tokens, s.embedding_size, [&](float* out, size_t count, txr_error* error) {
    return txr_token_vectors(s.states, normalize, out, count, error);
  });
}

PyObject* states_text_logits(PyObject* object, PyObject*) {
  const auto& s = *reinterpret_cast<StatesObject*>(object);
  return filled(s.texts, s.outputs, [&](float* out, size_t count, txr_error* error) {
    return txr_text_logits(s.states, out, count, error);
  });
}

PyObject* states_token_logits(PyObject* object, PyObject* rows) {
  const auto& s = *reinterpret_cast<StatesObject*>(object);
  Integers<int64_t> wanted;
  const bool all = rows == Py_None;
  if (!all && !wanted.read(rows, "rows")) return nullptr;
  return filled(all ? s.tokens : wanted.size(), s.outputs, [&](float* out, size_t count, txr_error* error) {
    static const int64_t none = 0;
    const int64_t* const data = all ? nullptr : wanted.data() ? wanted.data() : &none;
    return txr_token_logits(s.states, data, wanted.size(), out, count, error);
  });
}

PyObject* states_top_k(PyObject* object, PyObject* args) {
  const auto& s = *reinterpret_cast<StatesObject*>(object);
  PyObject* rows;
  Py_ssize_t k;
  if (!PyArg_ParseTuple(args, "On", &rows, &k)) return nullptr;
  Integers<int64_t> wanted;
  if (!wanted.read(rows, "rows")) return nullptr;
  if (k < 1 || static_cast<size_t>(k) > s.outputs) {
    return s.outputs ? PyErr_Format(PyExc_ValueError, "Encoder: expected k from 1 to %zu, got %zd", s.outputs, k)
                     : PyErr_Format(PyExc_ValueError, "Encoder: this model has no head: there is nothing to rank");
  }
  const auto columns = static_cast<size_t>(k);
  const Owned indices(reinterpret_cast<PyObject*>(new_array<int64_t>(wanted.size(), columns)));
  const Owned scores(reinterpret_cast<PyObject*>(new_array<float>(wanted.size(), columns)));
  if (!indices || !scores) return nullptr;
  auto* const index = static_cast<int64_t*>(reinterpret_cast<Array*>(indices.get())->data);
  auto* const score = static_cast<float*>(reinterpret_cast<Array*>(scores.get())->data);
  const bool done = call([&](txr_error* error) {
    return txr_top_k(s.states, wanted.data(), wanted.size(), columns, index, score, error);
  });
  return done ? PyTuple_Pack(2, indices.get(), scores.get()) : nullptr;
}

PyObject* states_sparse(PyObject* object, PyObject* args) {
  const auto& s = *reinterpret_cast<StatesObject*>(object);
  int sum, twice;
  if (!PyArg_ParseTuple(args, "pp", &sum, &twice)) return nullptr;
  const txr_sparse_pooling pooling = {sizeof pooling, sum, twice};
  txr_sparse* sparse = nullptr;
  txr_sparse_view view = {};
  view.struct_size = sizeof view;
  const bool done = call([&](txr_error* error) {
    const txr_status status = txr_sparse_pool(s.states, &pooling, &sparse, error);
    return status == TXR_OK ? txr_view_sparse(sparse, &view, error) : status;
  });
  const std::unique_ptr<txr_sparse, decltype(&txr_free_sparse)> owned(sparse, txr_free_sparse);
  if (!done) return nullptr;
  const auto row = [](const auto* data, size_t count) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    Array* const array = new_array<T>(1, count);
    if (array && count) std::memcpy(array->data, data, count * sizeof(T));
    return Owned(reinterpret_cast<PyObject*>(array));
  };
  const Owned bounds = row(view.bounds, view.texts + 1), indices = row(view.indices, view.entries),
              values = row(view.values, view.entries);
  return bounds && indices && values ? PyTuple_Pack(3, bounds.get(), indices.get(), values.get()) : nullptr;
}

PyMethodDef states_methods[] = {
    {"hidden", states_hidden, METH_NOARGS, "fp32 [tokens, hidden_size]."},
    {"pool", states_pool, METH_VARARGS, "pool(mode, normalize, dimensions, skipped=0) -> fp32 [texts, dimensions]."},
    {"token_vectors", states_token_vectors, METH_VARARGS, "token_vectors(normalize) -> fp32 [tokens, embedding_size]."},
    {"text_logits", states_text_logits, METH_NOARGS, "fp32 [texts, outputs]."},
    {"token_logits", states_token_logits, METH_O, "token_logits(rows or None) -> fp32 [rows, outputs]."},
    {"top_k", states_top_k, METH_VARARGS, "top_k(rows, k) -> int64 and fp32 [rows, k]."},
    {"sparse", states_sparse, METH_VARARGS,
     "sparse(sum, twice) -> int64 [1, texts + 1], int64 [1, entries], fp32 [1, entries]."},
    {nullptr, nullptr, 0, nullptr}};
PyType_Slot states_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(states_dealloc)},
                              {Py_tp_methods, states_methods},
                              {Py_tp_doc, const_cast<char*>("The hidden states of one batch.")},
                              {0, nullptr}};
PyType_Spec states_spec = {"torch_ext._runtime.States", sizeof(StatesObject), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, states_slots};

// ---- Encoder --------------------------------------------------------------------------------------------------------

struct EncoderObject {
  PyObject_HEAD txr_encoder* encoder;
  size_t hidden_size, embedding_size, outputs;
  bool projects;
};

void encoder_dealloc(PyObject* self) {
  txr_encoder* const encoder = reinterpret_cast<EncoderObject*>(self)->encoder;
  PyThreadState* const state = PyEval_SaveThread();  // its threads are joined
  txr_close(encoder);
  PyEval_RestoreThread(state);
  free_object(self);
}

template <typename Object>
Object* allocate(PyTypeObject* type) {
  return reinterpret_cast<Object*>(reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0));
}

// An Encoder of what open(encoder, error) makes.
template <typename F>
PyObject* new_encoder(const F& open) {
  auto* const self = allocate<EncoderObject>(encoder_type);
  if (!self) return nullptr;
  txr_info info = {};
  info.struct_size = sizeof info;
  const bool opened = call([&](txr_error* error) {
    const txr_status status = open(&self->encoder, error);
    return status == TXR_OK ? txr_describe(self->encoder, &info, error) : status;
  });
  if (!opened) {
    Py_DECREF(self);
    return nullptr;
  }
  self->hidden_size = static_cast<size_t>(info.hidden_size);
  self->embedding_size = static_cast<size_t>(info.embedding_size);
  self->outputs = static_cast<size_t>(info.outputs);
  self->projects = info.task && std::strcmp(info.task, "feature-extraction") == 0;
  return reinterpret_cast<PyObject*>(self);
}

PyObject* encoder_encode(PyObject* object, PyObject* args) {
  const auto& self = *reinterpret_cast<EncoderObject*>(object);
  PyObject *ids_object, *bounds_object, *types_object, *attended_object;
  if (!PyArg_ParseTuple(args, "OOOO", &ids_object, &bounds_object, &types_object, &attended_object)) return nullptr;
  Integers<int64_t> ids, types;
  Integers<int32_t> bounds, attended;
  if (!ids.read(ids_object, "input_ids") || !bounds.read(bounds_object, "cu_seqlens")) return nullptr;
  const bool typed = types_object != Py_None;
  if (typed && !types.read(types_object, "token_type_ids")) return nullptr;
  if (typed && types.size() != ids.size()) {
    return PyErr_Format(PyExc_ValueError, "Encoder: expected token_type_ids [%zu], got [%zu]", ids.size(),
                        types.size());
  }
  if (bounds.size() < 2) {
    return PyErr_Format(PyExc_ValueError,
                        "Encoder: expected at least one text (cu_seqlens [texts + 1]), got an empty batch");
  }
  const bool fewer = attended_object != Py_None;
  if (fewer && !attended.read(attended_object, "attended")) return nullptr;
  if (fewer && attended.size() != bounds.size() - 1) {
    return PyErr_Format(PyExc_ValueError, "Encoder: expected attended [%zu], a number for each text, got [%zu]",
                        bounds.size() - 1, attended.size());
  }
  const txr_batch batch = {.struct_size = sizeof batch,
                           .ids = ids.data(),
                           .tokens = ids.size(),
                           .cu_seqlens = bounds.data(),
                           .texts = bounds.size() - 1,
                           .type_ids = typed ? types.data() : nullptr,
                           .attended = fewer ? attended.data() : nullptr};
  auto* const states = allocate<StatesObject>(states_type);
  if (!states) return nullptr;
  if (!call([&](txr_error* error) { return txr_encode(self.encoder, &batch, &states->states, error); })) {
    Py_DECREF(states);
    return nullptr;
  }
  states->tokens = ids.size();
  states->texts = bounds.size() - 1;
  states->hidden_size = self.hidden_size;
  states->embedding_size = self.embedding_size;
  states->outputs = self.outputs;
  states->projects = self.projects;
  return reinterpret_cast<PyObject*>(states);
}

PyObject* encoder_info(PyObject* object, PyObject*) {
  txr_info i = {};
  i.struct_size = sizeof i;
  if (!call([&](txr_error* error) {
        return txr_describe(reinterpret_cast<EncoderObject*>(object)->encoder, &i, error);
      })) {
    return nullptr;
  }
  return Py_BuildValue(
      "{s:s,s:s,s:z,s:s,s:s,s:z,s:L,s:L,s:L,s:L,s:L,s:L,s:n,s:n,s:L}", "architecture", i.architecture, "dtype", i.dtype,
      "task", i.task, "isa", i.isa, "encoder_json", i.encoder_json, "head_json", i.head_json, "hidden_size",
      static_cast<long long>(i.hidden_size), "num_layers", static_cast<long long>(i.num_layers), "max_positions",
      static_cast<long long>(i.max_positions), "vocab_size", static_cast<long long>(i.vocab_size), "type_vocab_size",
      static_cast<long long>(i.type_vocab_size), "outputs", static_cast<long long>(i.outputs), "threads",
      static_cast<Py_ssize_t>(i.threads), "image_bytes", static_cast<Py_ssize_t>(i.image_bytes), "embedding_size",
      static_cast<long long>(i.embedding_size));
}

PyObject* encoder_share(PyObject* object, PyObject*) {
  int fd = -1;
  txr_encoder* const encoder = reinterpret_cast<EncoderObject*>(object)->encoder;
  return call([&](txr_error* error) { return txr_share(encoder, &fd, error); }) ? PyLong_FromLong(fd) : nullptr;
}

PyObject* encoder_save_image(PyObject* object, PyObject* args) {
  const char* path;
  if (!PyArg_ParseTuple(args, "y", &path)) return nullptr;
  txr_encoder* const encoder = reinterpret_cast<EncoderObject*>(object)->encoder;
  if (!call([&](txr_error* error) { return txr_save_image(encoder, path, error); })) return nullptr;
  return Py_NewRef(Py_None);
}

PyObject* encoder_release_workspace(PyObject* object, PyObject*) {
  txr_encoder* const encoder = reinterpret_cast<EncoderObject*>(object)->encoder;
  return call([&](txr_error* error) { return txr_release_workspace(encoder, error); }) ? Py_NewRef(Py_None) : nullptr;
}

PyMethodDef encoder_methods[] = {
    {"encode", encoder_encode, METH_VARARGS, "encode(ids, cu_seqlens, type_ids or None, attended or None) -> States."},
    {"info", encoder_info, METH_NOARGS, "What the model and the engine are, as a dictionary."},
    {"share", encoder_share, METH_NOARGS, "A descriptor of the packed weights in sealed memory."},
    {"save_image", encoder_save_image, METH_VARARGS, "save_image(path)."},
    {"release_workspace", encoder_release_workspace, METH_NOARGS, "Frees what threads keep for the next batch."},
    {nullptr, nullptr, 0, nullptr}};
PyType_Slot encoder_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(encoder_dealloc)},
                               {Py_tp_methods, encoder_methods},
                               {Py_tp_doc, const_cast<char*>("A model that is ready to run.")},
                               {0, nullptr}};
PyType_Spec encoder_spec = {"torch_ext._runtime.Encoder", sizeof(EncoderObject), 0,
                            Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, encoder_slots};

// ---- functions of the module ----------------------------------------------------------------------------------------

// The options that all functions take: (dtype or None, threads, cpus, pin, shared).
struct ParsedOptions {
  txr_options options = {};
  std::vector<int32_t> cpus;

  bool read(PyObject* tuple) {
    PyObject* cpu_tuple;
    int pin, shared;
    Py_ssize_t threads;
    const char* dtype;
    if (!PyArg_ParseTuple(tuple, "znO!pp", &dtype, &threads, &PyTuple_Type, &cpu_tuple, &pin, &shared)) return false;
    if (threads < 0) {
      PyErr_Format(PyExc_ValueError, "Encoder: expected threads of at least 0, got %zd", threads);
      return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(cpu_tuple); ++i) {
      int overflow = 0;
      PyObject* const number = PyTuple_GetItem(cpu_tuple, i);
      const long cpu = PyLong_AsLongAndOverflow(number, &overflow);
      if (cpu == -1 && PyErr_Occurred()) return false;
      if (overflow || cpu < 0 || cpu > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "Encoder: expected numbers of CPUs, got %S", number);
        return false;
      }
      cpus.push_back(static_cast<int32_t>(cpu));
    }
    options = {
        sizeof options, dtype, static_cast<size_t>(threads), cpus.empty() ? nullptr : cpus.data(), cpus.size(), pin,
        shared};
    return true;
  }
};

PyObject* module_open(PyObject*, PyObject* args) {
  const char* path;
  PyObject* tuple;
  ParsedOptions parsed;
  if (!PyArg_ParseTuple(args, "yO!", &path, &PyTuple_Type, &tuple) || !parsed.read(tuple)) return nullptr;
  return new_encoder(
      [&](txr_encoder** encoder, txr_error* error) { return txr_open(path, &parsed.options, encoder, error); });
}

PyObject* module_open_image(PyObject*, PyObject* args) {
  PyObject *source, *tuple;
  ParsedOptions parsed;
  if (!PyArg_ParseTuple(args, "OO!", &source, &PyTuple_Type, &tuple) || !parsed.read(tuple)) return nullptr;
  if (PyLong_Check(source)) {
    int overflow = 0;
    const long fd = PyLong_AsLongAndOverflow(source, &overflow);
    if (fd == -1 && PyErr_Occurred()) return nullptr;
    if (overflow || fd < 0 || fd > INT32_MAX) {
      return PyErr_Format(PyExc_ValueError, "Encoder: expected a file descriptor, got %S", source);
    }
    return new_encoder([&](txr_encoder** encoder, txr_error* error) {
      return txr_open_image_fd(static_cast<int>(fd), &parsed.options, encoder, error);
    });
  }
  const char* const path = PyBytes_AsString(source);
  if (!path) return nullptr;
  if (std::strlen(path) != static_cast<size_t>(PyBytes_Size(source))) {
    return PyErr_Format(PyExc_ValueError, "Encoder: expected a path, got one with a zero byte");
  }
  return new_encoder(
      [&](txr_encoder** encoder, txr_error* error) { return txr_open_image(path, &parsed.options, encoder, error); });
}

// A tensor of pack(): (name, element type, shape, buffer, mapped), the last as txr_tensor has it.
struct PackedTensors {
  std::vector<txr_tensor> tensors;
  std::vector<std::vector<uint64_t>> shapes;
  std::vector<Py_buffer> buffers;
  ~PackedTensors() {
    for (Py_buffer& buffer : buffers) PyBuffer_Release(&buffer);
  }

  bool read(PyObject* list) {
    const Py_ssize_t count = PyList_Size(list);
    shapes.reserve(static_cast<size_t>(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
      const char* name;
      int type, mapped;
      PyObject *shape, *data;
      if (!PyArg_ParseTuple(PyList_GetItem(list, i), "siO!Op", &name, &type, &PyTuple_Type, &shape, &data, &mapped)) {
        return false;
      }
      Py_buffer buffer;
      if (PyObject_GetBuffer(data, &buffer, 0) != 0) return false;
      buffers.push_back(buffer);
      static constexpr size_t kBytes[] = {4, 2, 2, 1};
      size_t bytes = type >= 0 && type < 4 ? kBytes[type] : 1;
      std::vector<uint64_t>& sizes = shapes.emplace_back();
      for (Py_ssize_t j = 0; j < PyTuple_Size(shape); ++j) {
        const unsigned long long n = PyLong_AsUnsignedLongLong(PyTuple_GetItem(shape, j));
        if (PyErr_Occurred()) return false;
        sizes.push_back(n);
        bytes *= n < (1ull << 31) ? static_cast<size_t>(n) : 0;
      }
      if (bytes != static_cast<size_t>(buffer.len)) {
        PyErr_Format(PyExc_ValueError, "Encoder: %s takes %zu bytes, its buffer has %zd", name, bytes, buffer.len);
        return false;
      }
      tensors.push_back({.struct_size = sizeof(txr_tensor),
                         .name = name,
                         .type = type,
                         .dimensions = static_cast<int32_t>(sizes.size()),
                         .shape = sizes.data(),
                         .data = buffer.buf,
                         .mapped = mapped});
    }
    return true;
  }
};

PyObject* module_pack(PyObject*, PyObject* args) {
  const char *name, *encoder_json, *head_json;
  PyObject *list, *tuple;
  ParsedOptions parsed;
  PackedTensors given;
  if (!PyArg_ParseTuple(args, "sszO!O!", &name, &encoder_json, &head_json, &PyList_Type, &list, &PyTuple_Type,
                        &tuple) ||
      !parsed.read(tuple) || !given.read(list)) {
    return nullptr;
  }
  const txr_model model = {sizeof model, name, encoder_json, head_json, given.tensors.data(), given.tensors.size()};
  return new_encoder(
      [&](txr_encoder** encoder, txr_error* error) { return txr_pack(&model, &parsed.options, encoder, error); });
}

PyObject* module_project_rows(PyObject*, PyObject* args) {
  PyObject* list;
  double eps;
  PackedTensors given;
  if (!PyArg_ParseTuple(args, "O!d", &PyList_Type, &list, &eps) || !given.read(list)) return nullptr;
  txr_projection projection = {};
  projection.struct_size = sizeof projection;
  projection.eps = eps;
  for (const txr_tensor& tensor : given.tensors) {
    const std::string_view name = tensor.name;
    (name == "table"         ? projection.table
     : name == "norm.weight" ? projection.norm_weight
     : name == "norm.bias"   ? projection.norm_bias
     : name == "bias"        ? projection.bias
     : name == "residual"    ? projection.residual
                             : projection.weight) = &tensor;
  }
  if (!projection.table || !projection.weight || projection.table->dimensions != 2 ||
      projection.weight->dimensions != 2) {
    return PyErr_Format(PyExc_ValueError, "project_rows: expected a table and a weight of 2 dimensions");
  }
  const size_t rows = static_cast<size_t>(projection.table->shape[0]);
  const size_t columns = static_cast<size_t>(projection.weight->shape[0]);
  Array* const result = new_array<float>(rows, columns);
  if (!result) return nullptr;
  Owned owned(reinterpret_cast<PyObject*>(result));
  const auto project = [&](txr_error* error) {
    return txr_project_rows(&projection, static_cast<float*>(result->data), rows * columns, error);
  };
  return call(project) ? owned.release() : nullptr;
}

// fp32 numbers of others that lie one after the other.
class Floats {
 public:
  Floats() = default;
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  ~Floats() {
    if (has_buffer_) PyBuffer_Release(&buffer_);
  }

  const float* data() const { return static_cast<const float*>(buffer_.buf); }
  size_t size(int dimension) const { return static_cast<size_t>(buffer_.shape[dimension]); }

  // False with an exception set if `object` has no such numbers, or another number of dimensions.
  bool read(PyObject* object, int dimensions) {
    if (PyObject_GetBuffer(object, &buffer_, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) return false;
    has_buffer_ = true;
    const char* const format = buffer_.format ? buffer_.format : "B";
    if (std::strcmp(format, "f") != 0 && std::strcmp(format, "<f") != 0) {
      PyErr_Format(PyExc_TypeError, "expected fp32 numbers (format f), got format %s", format);
      return false;
    }
    if (buffer_.ndim != dimensions) {
      PyErr_Format(PyExc_ValueError, "expected %d dimensions, got %d", dimensions, buffer_.ndim);
      return false;
    }
    return true;
  }

 private:
  Py_buffer buffer_ = {};
  bool has_buffer_ = false;
};

PyObject* module_json_row(PyObject*, PyObject* object) {
  Floats row;
  if (!row.read(object, 1)) return nullptr;
  const size_t count = row.size(0);
  const size_t room = 2 + count * (torch_ext::kFloatTextBytes + 1) + torch_ext::kFloatRoomBytes;
  const std::unique_ptr<char[]> text(new (std::nothrow) char[room]);
  if (!text) return PyErr_NoMemory();
  char* end = text.get();
  *end++ = '[';
  for (size_t i = 0; i < count; ++i) {
    if (i) *end++ = ',';
    end = torch_ext::write_float(row.data()[i], end);
  }
  *end++ = ']';
  return PyBytes_FromStringAndSize(text.get(), end - text.get());
}

PyObject* module_finite_rows(PyObject*, PyObject* object) {
  Floats rows;
  if (!rows.read(object, 2)) return nullptr;
  const size_t count = rows.size(0), width = rows.size(1);
  const std::unique_ptr<char[]> finite(new (std::nothrow) char[count + 1]);
  if (!finite) return PyErr_NoMemory();
  PyThreadState* const state = PyEval_SaveThread();
  for (size_t i = 0; i < count; ++i) {
    const float* const row = rows.data() + i * width;
    uint32_t wrong = 0;
    for (size_t j = 0; j < width; ++j) {
      uint32_t bits;
      std::memcpy(&bits, &row[j], sizeof bits);
      wrong |= (bits & 0x7f800000) == 0x7f800000;
    }
    finite[i] = wrong == 0;
  }
  PyEval_RestoreThread(state);
  return PyBytes_FromStringAndSize(finite.get(), static_cast<Py_ssize_t>(count));
}

PyObject* module_isa_report(PyObject*, PyObject*) {
  const char* const report = txr_isa_report();
  if (report) return PyUnicode_FromString(report);
  PyErr_SetString(PyExc_RuntimeError, "TORCH_EXT_ISA names no instruction set that torch_ext.runtime runs on");
  return nullptr;
}

PyObject* module_default_threads(PyObject*, PyObject*) { return PyLong_FromSize_t(txr_default_threads()); }

PyMethodDef module_methods[] = {
    {"open", module_open, METH_VARARGS, "open(path, options) -> Encoder."},
    {"open_image", module_open_image, METH_VARARGS, "open_image(path or descriptor, options) -> Encoder."},
    {"pack", module_pack, METH_VARARGS, "pack(name, encoder_json, head_json, tensors, options) -> Encoder."},
    {"project_rows", module_project_rows, METH_VARARGS,
     "project_rows(tensors named table, weight, bias, residual, norm.weight, norm.bias; eps) -> fp32 [rows, outputs]."},
    {"isa_report", module_isa_report, METH_NOARGS, "JSON."},
    {"json_row", module_json_row, METH_O, "json_row(fp32 [n]) -> JSON as bytes."},
    {"finite_rows", module_finite_rows, METH_O, "finite_rows(fp32 [rows, columns]) -> bytes [rows] of 0 and 1."},
    {"default_threads", module_default_threads, METH_NOARGS, "What affinity and CPU quota allow."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module_definition = {PyModuleDef_HEAD_INIT,
                                 "torch_ext._runtime",
                                 "Encoders without torch; see torch_ext.runtime.",
                                 -1,
                                 module_methods,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr};

PyTypeObject* add_type(PyObject* module, const char* name, PyType_Spec& spec) {
  PyObject* const type = PyType_FromSpec(&spec);
  if (!type || PyModule_AddObjectRef(module, name, type) != 0) return nullptr;
  return reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace

PyMODINIT_FUNC PyInit__runtime(void) {
  Owned module(PyModule_Create(&module_definition));
  if (!module) return nullptr;
  if (txr_abi_version() != TXR_ABI_VERSION) {
    PyErr_Format(PyExc_ImportError,
                 "torch_ext: libtorch_ext_runtime.so has interface %u, expected %d: reinstall torch-ext",
                 txr_abi_version(), TXR_ABI_VERSION);
    return nullptr;
  }
  if (!(array_type = add_type(module.get(), "Array", array_spec)) ||
      !(states_type = add_type(module.get(), "States", states_spec)) ||
      !(encoder_type = add_type(module.get(), "Encoder", encoder_spec))) {
    return nullptr;
  }
  return module.release();
}

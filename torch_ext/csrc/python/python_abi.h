/// What module.cpp needs of Python's stable ABI, that of 3.10: names, layouts and numbers are part of it and do not change
/// (PEP 384, https://docs.python.org/3/c-api/stable.html). So building needs no headers of Python, which systems have in a
/// package of their own. tests/csrc/test_c_interface.py compares this file with them.
///
/// The buffer protocol is in the stable ABI from 3.11 on; in 3.10 the structure, the functions and the slot are the same.
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

using Py_ssize_t = std::ptrdiff_t;
struct PyTypeObject;
struct PyThreadState;
struct PyObject {
  Py_ssize_t ob_refcnt;
  PyTypeObject* ob_type;
};

using PyCFunction = PyObject* (*)(PyObject*, PyObject*);
using allocfunc = PyObject* (*)(PyTypeObject*, Py_ssize_t);
using freefunc = void (*)(void*);
using PyCapsule_Destructor = void (*)(PyObject*);

struct PyMethodDef {
  const char* ml_name;
  PyCFunction ml_meth;
  int ml_flags;
  const char* ml_doc;
};
struct PyGetSetDef {
  const char* name;
  PyObject* (*get)(PyObject*, void*);
  int (*set)(PyObject*, PyObject*, void*);
  const char* doc;
  void* closure;
};
struct PyType_Slot {
  int slot;
  void* pfunc;
};
struct PyType_Spec {
  const char* name;
  int basicsize, itemsize;
  unsigned int flags;
  PyType_Slot* slots;
};
struct PyModuleDef_Base {
  PyObject ob_base;
  PyObject* (*m_init)();
  Py_ssize_t m_index;
  PyObject* m_copy;
};
struct PyModuleDef {
  PyModuleDef_Base m_base;
  const char *m_name, *m_doc;
  Py_ssize_t m_size;
  PyMethodDef* m_methods;
  void* m_slots;
  int (*m_traverse)(PyObject*, void*, void*);
  int (*m_clear)(PyObject*);
  void (*m_free)(void*);
};
struct Py_buffer {
  void* buf;
  PyObject* obj;
  Py_ssize_t len, itemsize;
  int readonly, ndim;
  char* format;
  Py_ssize_t *shape, *strides, *suboffsets;
  void* internal;
};
enum PyGILState_STATE { PyGILState_LOCKED, PyGILState_UNLOCKED };

extern PyObject _Py_NoneStruct, _Py_TrueStruct;
extern PyTypeObject PyTuple_Type, PyList_Type;
extern PyObject *PyExc_BufferError, *PyExc_FileNotFoundError, *PyExc_ImportError, *PyExc_MemoryError, *PyExc_OSError,
    *PyExc_RuntimeError, *PyExc_TypeError, *PyExc_ValueError;

void Py_IncRef(PyObject* o);
void Py_DecRef(PyObject* o);
int Py_IsInitialized(void);
PyObject* Py_BuildValue(const char* format, ...);
int PyArg_ParseTuple(PyObject* args, const char* format, ...);
int PyObject_GetBuffer(PyObject* exporter, Py_buffer* view, int flags);
int PyObject_CheckBuffer(PyObject* o);
void PyBuffer_Release(Py_buffer* view);
char* PyBytes_AsString(PyObject* o);
PyObject* PyBytes_FromStringAndSize(const char* text, Py_ssize_t size);
Py_ssize_t PyBytes_Size(PyObject* o);
PyObject* PyCapsule_New(void* pointer, const char* name, PyCapsule_Destructor destructor);
void* PyCapsule_GetPointer(PyObject* capsule, const char* name);
int PyCapsule_IsValid(PyObject* capsule, const char* name);
int PyCapsule_SetName(PyObject* capsule, const char* name);
PyObject* PyDict_GetItemString(PyObject* dict, const char* key);
PyObject* PyErr_Format(PyObject* exception, const char* format, ...);
PyObject* PyErr_NoMemory(void);
PyObject* PyErr_Occurred(void);
void PyErr_SetObject(PyObject* exception, PyObject* value);
void PyErr_SetString(PyObject* exception, const char* message);
PyThreadState* PyEval_SaveThread(void);
void PyEval_RestoreThread(PyThreadState* state);
PyGILState_STATE PyGILState_Ensure(void);
void PyGILState_Release(PyGILState_STATE state);
PyObject* PyList_GetItem(PyObject* list, Py_ssize_t i);
Py_ssize_t PyList_Size(PyObject* list);
long PyLong_AsLongAndOverflow(PyObject* o, int* overflow);
unsigned long long PyLong_AsUnsignedLongLong(PyObject* o);
PyObject* PyLong_FromLong(long value);
PyObject* PyLong_FromSize_t(size_t value);
PyObject* PyMemoryView_FromObject(PyObject* o);
int PyModule_AddObjectRef(PyObject* module, const char* name, PyObject* value);
PyObject* PyModule_Create2(PyModuleDef* definition, int api_version);
PyObject* PyObject_CallMethod(PyObject* o, const char* name, const char* format, ...);
PyObject* PyObject_GetAttrString(PyObject* o, const char* name);
int PyObject_HasAttrString(PyObject* o, const char* name);
PyObject* PyTuple_GetItem(PyObject* tuple, Py_ssize_t i);
PyObject* PyTuple_Pack(Py_ssize_t n, ...);
Py_ssize_t PyTuple_Size(PyObject* tuple);
PyObject* PyType_FromSpec(PyType_Spec* spec);
unsigned long PyType_GetFlags(PyTypeObject* type);
void* PyType_GetSlot(PyTypeObject* type, int slot);
PyObject* PyUnicode_DecodeUTF8(const char* text, Py_ssize_t size, const char* errors);
PyObject* PyUnicode_FromFormat(const char* format, ...);
PyObject* PyUnicode_FromString(const char* text);

}  // extern "C"
#pragma GCC visibility pop

constexpr int METH_VARARGS = 0x1, METH_KEYWORDS = 0x2, METH_NOARGS = 0x4, METH_O = 0x8;
constexpr unsigned int Py_TPFLAGS_DEFAULT = 0, Py_TPFLAGS_DISALLOW_INSTANTIATION = 1u << 7;
constexpr unsigned long Py_TPFLAGS_LONG_SUBCLASS = 1ul << 24;
constexpr int Py_bf_getbuffer = 1, Py_sq_length = 45, Py_tp_alloc = 47, Py_tp_dealloc = 52, Py_tp_doc = 56,
              Py_tp_methods = 64, Py_tp_repr = 66, Py_tp_getset = 73, Py_tp_free = 74;
constexpr int PyBUF_WRITABLE = 0x1, PyBUF_FORMAT = 0x4, PyBUF_ND = 0x8, PyBUF_STRIDES = 0x18,
              PyBUF_C_CONTIGUOUS = 0x20 | PyBUF_STRIDES, PyBUF_F_CONTIGUOUS = 0x40 | PyBUF_STRIDES;
constexpr int PYTHON_ABI_VERSION = 3;

#define PyObject_HEAD PyObject ob_base;
#define PyModuleDef_HEAD_INIT {{1, nullptr}, nullptr, 0, nullptr}
#define PyMODINIT_FUNC extern "C" __attribute__((visibility("default"))) PyObject*

inline PyObject* const Py_None = &_Py_NoneStruct;
inline PyObject* const Py_True = &_Py_TrueStruct;

inline PyObject* Py_NewRef(PyObject* o) {
  Py_IncRef(o);
  return o;
}
template <typename T>
void Py_DECREF(T* o) {
  Py_DecRef(reinterpret_cast<PyObject*>(o));
}
inline PyTypeObject* Py_TYPE(PyObject* o) { return o->ob_type; }
inline bool PyLong_Check(PyObject* o) { return PyType_GetFlags(Py_TYPE(o)) & Py_TPFLAGS_LONG_SUBCLASS; }
inline PyObject* PyModule_Create(PyModuleDef* definition) { return PyModule_Create2(definition, PYTHON_ABI_VERSION); }

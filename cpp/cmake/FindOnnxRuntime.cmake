# Finds ONNX Runtime: OnnxRuntime::OnnxRuntime.
#
# Hints, as cache variables or in the environment; else what cpp/prepare fetched is taken:
#   ONNXRUNTIME_INCLUDE_DIR   folder of onnxruntime_c_api.h (a release's include)
#   ONNXRUNTIME_LIBRARY       libonnxruntime.so of any newer version; or, in the environment alone, its folder as
#                             ONNXRUNTIME_LIBRARY_DIR
set(deps ${CMAKE_CURRENT_LIST_DIR}/../.deps)
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h
  HINTS $ENV{ONNXRUNTIME_INCLUDE_DIR} ${deps}/include PATH_SUFFIXES onnxruntime onnxruntime/core/session)
if(NOT ONNXRUNTIME_LIBRARY AND EXISTS "$ENV{ONNXRUNTIME_LIBRARY}")
  set(ONNXRUNTIME_LIBRARY "$ENV{ONNXRUNTIME_LIBRARY}" CACHE FILEPATH "libonnxruntime.so" FORCE)
endif()
find_library(ONNXRUNTIME_LIBRARY onnxruntime HINTS $ENV{ONNXRUNTIME_LIBRARY_DIR} ${deps}/lib)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime REQUIRED_VARS ONNXRUNTIME_LIBRARY ONNXRUNTIME_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "run cpp/prepare, or set ONNXRUNTIME_INCLUDE_DIR and ONNXRUNTIME_LIBRARY")
if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::OnnxRuntime)
  add_library(OnnxRuntime::OnnxRuntime UNKNOWN IMPORTED)
  set_target_properties(OnnxRuntime::OnnxRuntime PROPERTIES
    IMPORTED_LOCATION ${ONNXRUNTIME_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${ONNXRUNTIME_INCLUDE_DIR})
endif()
mark_as_advanced(ONNXRUNTIME_INCLUDE_DIR ONNXRUNTIME_LIBRARY)

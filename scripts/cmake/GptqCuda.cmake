# Whether the CUDA kernels are built, and what they need: the option GPTQ_CUDA, on where there are nvcc and a torch with
# CUDA, and then the language CUDA and the target gptq::torch_cuda_runtime. The driver and the rest of the library do not
# depend on them, and a library built with them runs on machines without a GPU.

include(CheckLanguage)
check_language(CUDA)
set(gptq_torch_c10_cuda ${GPTQ_TORCH_ROOT}/lib/libc10_cuda.so)
set(gptq_cuda_default OFF)
if(CMAKE_CUDA_COMPILER AND EXISTS ${gptq_torch_c10_cuda} AND NOT GPTQ_SANITIZE)
  set(gptq_cuda_default ON)
endif()
option(GPTQ_CUDA "Build the CUDA kernels (needs nvcc, and a torch with CUDA)" ${gptq_cuda_default})

if(GPTQ_CUDA)
  if(NOT EXISTS ${gptq_torch_c10_cuda})
    message(FATAL_ERROR "GPTQ_CUDA is ON, but ${gptq_torch_c10_cuda} does not exist: this torch has no CUDA")
  endif()
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90)
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "CUDA kernels by nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
  add_library(gptq::torch_cuda_runtime SHARED IMPORTED)
  set_target_properties(gptq::torch_cuda_runtime PROPERTIES IMPORTED_LOCATION ${gptq_torch_c10_cuda})
endif()

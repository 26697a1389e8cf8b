# Install rules and the CMake package: find_package(gptq) gives gptq::gptq.

include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/gptq)

# The tree can be moved as long as torch stays where it is.
file(RELATIVE_PATH bin_to_lib ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
set_target_properties(gptq PROPERTIES INSTALL_RPATH "$ORIGIN;${GPTQ_TORCH_ROOT}/lib")
install(TARGETS gptq EXPORT gptqTargets)
install(FILES ${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/libgptq.json DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/gptq DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(TARGET gptq_driver)
  set_target_properties(gptq_driver PROPERTIES INSTALL_RPATH "$ORIGIN/${bin_to_lib};${GPTQ_TORCH_ROOT}/lib")
  install(TARGETS gptq_driver)
endif()

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/gptqConfig.cmake.in ${PROJECT_BINARY_DIR}/gptqConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/gptqConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/gptqConfig.cmake ${PROJECT_BINARY_DIR}/gptqConfigVersion.cmake
              ${CMAKE_CURRENT_LIST_DIR}/GptqTorch.cmake
        DESTINATION ${package_dir})
install(EXPORT gptqTargets NAMESPACE gptq:: DESTINATION ${package_dir})

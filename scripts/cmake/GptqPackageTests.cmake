# Tests of the build itself: the library alone, and the installed tree as an outside project sees it.

set(without_other_packages)
foreach(package CLI11 GTest nlohmann_json PkgConfig Python3)
  list(APPEND without_other_packages -DCMAKE_DISABLE_FIND_PACKAGE_${package}=ON)
endforeach()
add_test(NAME package.library_needs_only_torch
         COMMAND ${CMAKE_COMMAND} -S ${PROJECT_SOURCE_DIR} -B ${PROJECT_BINARY_DIR}/library-only -G ${CMAKE_GENERATOR}
                 -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER} -DGPTQ_TORCH_DIR=${GPTQ_TORCH_ROOT}
                 -DGPTQ_BUILD_DRIVER=OFF -DGPTQ_BUILD_TESTS=OFF ${without_other_packages})

# A program without the sanitizer's runtime cannot load a library that has it.
if(GPTQ_INSTALL AND NOT GPTQ_SANITIZE)
  set(prefix ${PROJECT_BINARY_DIR}/install-test)
  add_test(NAME package.install COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --prefix ${prefix})
  set_tests_properties(package.install PROPERTIES FIXTURES_SETUP gptq_installed)
  add_test(NAME package.outside_project
           COMMAND ${CMAKE_CTEST_COMMAND} --build-and-test ${PROJECT_SOURCE_DIR}/tests/install
                   ${PROJECT_BINARY_DIR}/outside-project --build-generator ${CMAKE_GENERATOR}
                   --build-makeprogram ${CMAKE_MAKE_PROGRAM}
                   --build-options -DCMAKE_PREFIX_PATH=${prefix} -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
                   --test-command ${PROJECT_BINARY_DIR}/outside-project/roundtrip)
  set_tests_properties(package.outside_project PROPERTIES FIXTURES_REQUIRED gptq_installed)
  if(TARGET gptq_driver)
    add_test(NAME package.installed_driver COMMAND ${prefix}/${CMAKE_INSTALL_BINDIR}/gptq --help)
    set_tests_properties(package.installed_driver PROPERTIES FIXTURES_REQUIRED gptq_installed)
  endif()
endif()

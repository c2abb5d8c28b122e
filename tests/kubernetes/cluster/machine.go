package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// The addresses of a machine that has nothing but itself: all are its loopback's.
const (
	// controlPlane is where etcd, the API server and the controllers listen.
	controlPlane = "172.20.0.1"
	// service is the API server's address as pods know it, that of the service `kubernetes`. There is no kube-proxy that would
	// forward it, so the API server itself listens there.
	service = "10.96.0.1"
	// services is the range of services' addresses.
	services = "10.96.0.0/24"
)

const inside = "NVSHARE_TEST_INSIDE"

// Enter puts the test program into namespaces of its own, by starting it anew, so that the test changes nothing of the machine and
// nothing of the machine disturbs it:
//
//   - network: fixed ports and addresses, and nobody else's arbiter holds a GPU's claim;
//   - mounts: nodes have /var/lib/kubelet, /run/nvshare and so on to themselves;
//   - pids: all processes end when the test does.
//
// It returns only in the program that is inside. It needs root.
func Enter() error {
	if os.Getenv(inside) != "" {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("a cluster needs root: namespaces, mounts and control groups")
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		return err
	}
	own, err := os.Executable()
	if err != nil {
		return err
	}
	// The shell is the first process, the parent of orphans, and waits for them.
	script := fmt.Sprintf("ip link set lo up && ip address add %s/32 dev lo && ip address add %s/32 dev lo && \"$@\"; exit $?",
		controlPlane, service)
	argv := []string{"unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child",
		"--", "/bin/sh", "-c", script, "sh", own}
	argv = append(argv, os.Args[1:]...)
	return syscall.Exec(unshare, argv, append(os.Environ(), inside+"=1"))
}

func addAddress(address string) error {
	if out, err := exec.Command("ip", "address", "replace", address+"/32", "dev", "lo").CombinedOutput(); err != nil {
		return fmt.Errorf("give this machine the address %s: %w: %s", address, err, out)
	}
	return nil
}

package kubernetes

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	deploy    = "../../deploy"
	chart     = deploy + "/helm/nvshare"
	namespace = "gpus"
	release   = "0.1.0"
	// The same programs under another name: what an upgrade brings.
	nextRelease = "0.1.1"
)

// tool is helm or kubectl, which deploy/get-helm has fetched.
func tool(name string) string {
	return setting("NVSHARE_TEST_"+strings.ToUpper(name), "../../target/deploy-tools/"+name)
}

// command runs helm or kubectl as the cluster's administrator, and gives its standard output.
func (l *lab) command(name string, arguments ...string) (string, error) {
	command := exec.CommandContext(l.ctx, tool(name), arguments...)
	home := filepath.Join(l.Folder, "home")
	command.Env = append(os.Environ(), "KUBECONFIG="+l.Kubeconfig, "HOME="+home)
	var stdout, stderr strings.Builder
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s%s", name, strings.Join(arguments, " "), err, &stdout, &stderr)
	}
	return stdout.String(), nil
}

func (l *lab) runs(name string, arguments ...string) string {
	l.Helper()
	out, err := l.command(name, arguments...)
	l.must(err)
	return out
}

// releases makes the images of both releases.
func (l *lab) releases() {
	l.Helper()
	for _, tag := range []string{release, nextRelease} {
		l.image("nvshare:"+tag, map[string]string{
			"nvshare":            "usr/bin/nvshare",
			"nvshare-arbiter":    "usr/bin/nvshare-arbiter",
			"nvshare-kubernetes": "usr/bin/nvshare-kubernetes",
			"libnvshare.so":      "usr/lib/nvshare/libnvshare.so",
		})
	}
}

// values are the chart's, for nodes with simulated GPUs. They differ from a real cluster's in where the driver is, and in what tells it
// which simulated machine it belongs to.
func (n *gpuNode) values(by offer, tag string) string {
	n.lab.Helper()
	var env []map[string]string
	for _, variable := range n.environment {
		name, value, _ := strings.Cut(variable, "=")
		env = append(env, map[string]string{"name": name, "value": value})
	}
	values, err := json.Marshal(map[string]any{
		"image": map[string]any{"tag": tag},
		"driver": map[string]any{
			"access": "hostPath", "nvmlLibrary": driver + "/libnvidia-ml.so.1", "gpuCdiKind": simulatedKind,
		},
		"arbiter":      map[string]any{"settings": map[string]any{"capacity": "192MiB"}, "extraEnv": env},
		"devicePlugin": map[string]any{"enabled": by == devicePlugin, "extraEnv": env},
		"draDriver":    map[string]any{"enabled": by == dra, "extraEnv": env},
	})
	n.lab.must(err)
	path := filepath.Join(n.lab.Folder, "values-"+tag+".json")
	n.lab.must(os.WriteFile(path, values, 0o644))
	return path
}

// The chart's life: it is installed, upgraded beside pods that run, and removed.
func TestChart(t *testing.T) {
	if _, err := os.Stat(tool("helm")); err != nil {
		t.Skipf("there is no helm: %v; deploy/get-helm fetches it", err)
	}
	onEach(t, func(t *testing.T, by offer) {
		l := newLab(t, "")
		l.releases()
		n := l.addNode("node-1", 2)
		n.by = by
		values := n.values(by, release)
		l.runs("helm", "lint", "--strict", chart, "--values", values)
		l.runs("kubectl", "create", "namespace", namespace)
		rendered := l.runs("helm", "template", "nvshare", chart, "--namespace", namespace, "--values", values)
		path := filepath.Join(l.Folder, "rendered.yaml")
		l.must(os.WriteFile(path, []byte(rendered), 0o644))
		l.runs("kubectl", "apply", "--namespace", namespace, "--dry-run=server", "--filename", path)

		install := []string{"upgrade", "--install", "nvshare", chart, "--namespace", namespace, "--wait", "--timeout", setting("NVSHARE_TEST_PATIENCE", "4m")}
		if _, err := l.command("helm", append(install, "--values", values)...); err != nil {
			t.Fatalf("%v\n%s", err, l.describe())
		}
		l.until("the node's GPUs are offered", func() error { return n.offers(2) })
		l.create(pod("first", 1, job("100MiB")...))
		n.uses("first", release)

		// The pods that run keep their shim and go on; new ones get the new release.
		if _, err := l.command("helm", append(install, "--values", n.values(by, nextRelease))...); err != nil {
			t.Fatalf("%v\n%s", err, l.describe())
		}
		l.until("the node's GPUs are offered", func() error { return n.offers(2) })
		before := n.processes()["first"]
		l.create(pod("second", 1, job("100MiB")...))
		n.uses("second", nextRelease)
		if after := n.processes()["first"]; after != before {
			t.Fatalf("the first pod's container is another process: %d, it was %d", after, before)
		}
		if first, second := n.gpusOf("first"), n.gpusOf("second"); first[0] == second[0] {
			t.Fatalf("after the upgrade the second pod came to the first one's GPU %d", first[0])
		}

		l.runs("helm", "uninstall", "nvshare", "--namespace", namespace, "--wait")
		l.until("nothing of the chart is left", func() error {
			pods, err := l.Client.CoreV1().Pods(namespace).List(l.ctx, metav1.ListOptions{})
			if err == nil && len(pods.Items) > 0 {
				err = fmt.Errorf("pod %s", pods.Items[0].Name)
			}
			return err
		})
		if by == devicePlugin {
			l.until("the node offers none", func() error { return n.offers(0) })
		}
		for _, name := range []string{"first", "second"} {
			l.must(isRunning(l.get(name)))
		}
	})
}

// uses waits until a pod's container is a client of the node's arbiter, with the shim of that release.
func (n *gpuNode) uses(name, release string) {
	n.lab.Helper()
	n.wants(name, 100*mib)
	container, err := n.Container(n.lab.ctx, n.lab.get(name), "main")
	n.lab.must(err)
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", container.Pid))
	n.lab.must(err)
	if shim := release + "/libnvshare.so"; !strings.Contains(string(maps), shim) {
		n.lab.Fatalf("%s has not loaded .../%s: LD_PRELOAD=%s", name, shim, container.Env("LD_PRELOAD"))
	}
}

// describe says how the chart's pods are, for a message.
func (l *lab) describe() string {
	pods, err := l.Client.CoreV1().Pods(namespace).List(l.ctx, metav1.ListOptions{})
	if err != nil {
		return err.Error()
	}
	var lines []string
	for _, pod := range pods.Items {
		lines = append(lines, fmt.Sprintf("%s: %s %s", pod.Name, pod.Status.Phase, pod.Status.Message))
		for _, status := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
			lines = append(lines, fmt.Sprintf("  %s: %s", status.Name, status.State.String()))
			log, err := l.Client.CoreV1().Pods(namespace).GetLogs(pod.Name, &corev1.PodLogOptions{Container: status.Name}).DoRaw(l.ctx)
			lines = append(lines, fmt.Sprintf("  log: %s %v", log, err))
		}
	}
	events, err := l.Client.CoreV1().Events(namespace).List(l.ctx, metav1.ListOptions{})
	if err == nil {
		for _, event := range events.Items {
			if event.Type == corev1.EventTypeWarning {
				lines = append(lines, fmt.Sprintf("%s: %s: %s", event.InvolvedObject.Name, event.Reason, event.Message))
			}
		}
	}
	return strings.Join(lines, "\n")
}

// The API server takes what is shipped for those without helm.
func TestManifests(t *testing.T) {
	if _, err := os.Stat(tool("kubectl")); err != nil {
		t.Skipf("there is no kubectl: %v; deploy/get-helm fetches it", err)
	}
	l := newLab(t, "")
	files, err := filepath.Glob(deploy + "/manifests/*.yaml")
	l.must(err)
	examples, err := filepath.Glob(deploy + "/examples/*.yaml")
	l.must(err)
	if len(files) == 0 || len(examples) == 0 {
		t.Fatalf("there are no manifests or no examples in %s", deploy)
	}
	for _, file := range append(files, examples...) {
		text, err := os.ReadFile(file)
		l.must(err)
		// A dry run makes no namespace for what would be in it. The Prometheus operator's kinds are the operator's.
		if strings.Contains(string(text), "monitoring.coreos.com/") {
			t.Logf("skipped: %s has kinds of the Prometheus operator, which is not in this cluster", file)
			continue
		}
		if _, ns, found := strings.Cut(string(text), "\n  namespace: "); found {
			ns, _, _ = strings.Cut(ns, "\n")
			_, _ = l.command("kubectl", "create", "namespace", strings.TrimSpace(ns))
		}
		l.runs("kubectl", "apply", "--dry-run=server", "--filename", file)
	}
}

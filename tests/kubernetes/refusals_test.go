package kubernetes

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// event waits for an event of a pod, and gives its message.
func (l *lab) event(pod, reason string) string {
	l.Helper()
	var message string
	l.until(fmt.Sprintf("%s has an event %s", pod, reason), func() error {
		events, err := l.Client.CoreV1().Events("default").List(l.ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + pod})
		l.must(err)
		var seen []string
		for _, event := range events.Items {
			if event.Reason == reason {
				message = event.Message
				return nil
			}
			seen = append(seen, event.Reason+": "+event.Message)
		}
		return fmt.Errorf("events: %s", strings.Join(seen, "; "))
	})
	return message
}

// refused waits until the kubelet has refused a pod, and gives its message.
func (l *lab) refused(name string) string {
	l.Helper()
	l.until(name+" is refused", func() error {
		pod := l.get(name)
		if pod.Status.Phase != corev1.PodFailed {
			return fmt.Errorf("%s %s", pod.Status.Phase, pod.Status.Message)
		}
		return nil
	})
	return l.get(name).Status.Message
}

func says(t *testing.T, message string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(message, part) {
			t.Fatalf("the message does not say %q: %s", part, message)
		}
	}
}

// What a pod's owner reads who asks for what cannot be.
func TestRequestsThatCannotBeMet(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 1)
	n.startArbiter()
	n.start(devicePlugin)

	for _, count := range []string{"-1", "0.5"} {
		wrong := pod("wrong", 1, "true")
		quantity := wrong.Spec.Containers[0].Resources.Limits[resourceName].DeepCopy()
		l.must(quantity.UnmarshalJSON([]byte(count)))
		wrong.Spec.Containers[0].Resources.Limits[resourceName] = quantity
		wrong.Spec.Containers[0].Resources.Requests[resourceName] = quantity
		_, err := l.Client.CoreV1().Pods("default").Create(l.ctx, wrong, metav1.CreateOptions{})
		if err == nil {
			t.Fatalf("the API server takes %s of %s", count, resourceName)
		}
		says(t, err.Error(), resourceName)
	}

	// None is none: the pod runs, without a GPU and without nvshare.
	l.create(pod("none", 0, "sleep", "infinity"))
	l.until("a pod that asks for 0 runs", func() error { return isRunning(l.get("none")) })
	container, err := n.Container(l.ctx, l.get("none"), "main")
	l.must(err)
	if preload := container.Env("LD_PRELOAD"); preload != "" {
		t.Fatalf("a pod that asks for 0 has LD_PRELOAD=%s", preload)
	}

	l.create(pod("eleven", 11, "true"))
	says(t, l.event("eleven", "FailedScheduling"), "Insufficient "+resourceName)
}

// The GPU is lost while the node offers it.
func TestAGPUThatGoesAway(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 2)
	n.startArbiter()
	n.start(devicePlugin)
	l.must(n.Write(l.ctx, faults, "1 lost\n"))
	l.until("ten of twenty virtual GPUs are left", func() error { return n.offers(1) })
	says(t, n.offered.Tail(1000), "NVML does not reach "+n.uuids[1], "nvidia-smi -r")
	for i := range 10 {
		counts := n.comes(fmt.Sprintf("pod-%d", i))
		if counts[1] > 0 {
			t.Fatalf("a pod came to the GPU that is lost: %v", counts)
		}
	}
	l.create(pod("one-too-many", 1, "true"))
	says(t, l.event("one-too-many", "FailedScheduling"), "Insufficient "+resourceName)
	// The pod waits, and comes when the GPU does.
	l.must(n.Write(l.ctx, faults, ""))
	l.until("it runs to its end on the GPU that is back", func() error {
		if pod := l.get("one-too-many"); pod.Status.Phase != corev1.PodSucceeded {
			return fmt.Errorf("%s %s", pod.Status.Phase, pod.Status.Message)
		}
		return nil
	})
}

// Nobody serves the GPUs: pods wait, and the plugin's log says for what.
func TestAnArbiterThatIsGone(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 1)
	n.startArbiter()
	n.start(devicePlugin, "--arbiter-grace=2s")
	l.create(pod("before", 1, "sleep", "infinity"))
	l.until("the first pod runs", func() error { return isRunning(l.get("before")) })
	n.arbiter.Kill()
	l.until("no virtual GPU can be had", func() error { return n.offers(0) })
	says(t, n.offered.Tail(1000), "no arbiter answers in /run/nvshare", "start it again")
	l.create(pod("meanwhile", 1, "true"))
	says(t, l.event("meanwhile", "FailedScheduling"), "Insufficient "+resourceName)
	l.must(isRunning(l.get("before")))
	l.must(n.arbiter.Start())
	l.until("the pod that waited runs to its end", func() error {
		if pod := l.get("meanwhile"); pod.Status.Phase != corev1.PodSucceeded {
			return fmt.Errorf("%s %s", pod.Status.Phase, pod.Status.Message)
		}
		return nil
	})
}

// The plugin's socket is removed behind its back. The kubelet keeps its connection, and takes no second registration meanwhile. A kubelet that starts
// anew finds the new socket.
func TestASocketThatIsGone(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 1)
	n.startArbiter()
	n.start(devicePlugin)
	_, err := n.Run(l.ctx, nil, "/bin/sh", "-c", "rm /var/lib/kubelet/device-plugins/nvshare*.sock")
	l.must(err)
	l.until("there is a socket again", func() error {
		_, err := n.Run(l.ctx, nil, "/bin/sh", "-c", "test -S /var/lib/kubelet/device-plugins/nvshare*.sock")
		return err
	})
	n.comes("after")
	n.restartKubelet()
	n.comes("after-a-restart")

	// Without the kubelet's folder there is nobody to register with.
	out, err := n.Run(l.ctx, n.environment, filepath.Join(l.built, "nvshare-kubernetes"), "device-plugin", "--kubelet-dir=/nowhere")
	if err == nil {
		t.Fatal("a plugin starts without a kubelet's folder")
	}
	says(t, out, "/nowhere", "--kubelet-dir")
}

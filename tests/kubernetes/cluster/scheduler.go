package cluster

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

func (c *Cluster) startScheduler(ctx context.Context) error {
	kubeconfig, err := c.authority.client("scheduler", "system:kube-scheduler")
	if err != nil {
		return err
	}
	config := map[string]any{"apiVersion": "kubescheduler.config.k8s.io/v1", "kind": "KubeSchedulerConfiguration"}
	if c.SchedulerConfig != "" {
		if err := yaml.Unmarshal([]byte(c.SchedulerConfig), &config); err != nil {
			return fmt.Errorf("the scheduler's configuration: %w", err)
		}
	}
	// Whatever the file says, which is written for another cluster.
	if err := unstructured.SetNestedField(config, kubeconfig, "clientConnection", "kubeconfig"); err != nil {
		return err
	}
	if err := unstructured.SetNestedField(config, false, "leaderElection", "leaderElect"); err != nil {
		return err
	}
	text, err := yaml.Marshal(config)
	if err != nil {
		return err
	}
	path, err := c.write("scheduler.yaml", string(text))
	if err != nil {
		return err
	}
	c.Scheduler = c.component("kube-scheduler",
		"--config="+path,
		"--authentication-kubeconfig="+kubeconfig,
		"--authorization-kubeconfig="+kubeconfig,
		"--bind-address="+controlPlane,
	)
	if err := c.Scheduler.Start(); err != nil {
		return err
	}
	return await(ctx, "the scheduler is ready", c.Scheduler, func(ctx context.Context) error {
		return ready(ctx, "https://"+controlPlane+":10259/readyz")
	})
}

var selfSigned = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}

// ready asks a component's own address, which has a certificate that it made itself.
func ready(ctx context.Context, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := selfSigned.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, response.Status)
	}
	return nil
}
